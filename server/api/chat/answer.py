"""Outputs of all choices → the body of a chat completion that is not streamed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgspec

from server.api.chat.details import encode_logprobs, logprobs_object
from server.api.protocol import CompletionUsage, end_reason
from server.api.tool_calls import CallArguments, CallParser, CallStart, Content
from server.errors import RequestFailedError
from server.types import RequestOutput


@dataclass(frozen=True)
class Answer:
    """What every piece of one answer says about itself, and which details it has."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    has_service_tier: bool
    logprobs: bool
    token_ids: bool

    def chunk_head(self) -> dict[str, Any]:
        head: dict[str, Any] = {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }
        if self.has_service_tier:
            head["service_tier"] = "default"
        return head


class ChoiceBuilder:
    """Collects the outputs of one choice. `parser` reads calls, None where the answer is text."""

    def __init__(self, index: int, answer: Answer, parser: CallParser | None) -> None:
        self._index = index
        self._answer = answer
        self._parser = parser
        self._texts: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._arguments: list[list[str]] = []
        self._entries: list[bytes] = []
        self._token_ids: list[int] = []
        self._last: RequestOutput | None = None

    def add(self, output: RequestOutput) -> None:
        self._last = output
        self._token_ids += output.token_ids
        if self._answer.logprobs:
            # At once: for all tokens of a long answer together it would hold up everybody's stream.
            self._entries.append(encode_logprobs(output.logprobs))
        if self._parser is None:
            self._texts.append(output.text)
            return
        ended = output.finish_reason is not None
        for piece in self._parser.push(output.text) + (self._parser.flush() if ended else []):
            match piece:
                case Content(text=text):
                    self._texts.append(text)
                case CallStart(id=call_id, name=name):
                    self._calls.append({"id": call_id, "type": "function", "function": {"name": name}})
                    self._arguments.append([])
                case CallArguments(index=index, text=text):
                    self._arguments[index].append(text)

    @property
    def has_ended(self) -> bool:
        return self._last is not None and self._last.finish_reason is not None

    def build(self) -> dict[str, Any]:
        """The choice as it is sent. Raises RequestFailedError for one that did not end by itself."""
        reason = None if self._last is None else end_reason(self._last)
        if self._last is None or reason is None:
            raise RequestFailedError("the answer ended without a reason")
        choice: dict[str, Any] = {
            "index": self._index,
            "message": self._message(),
            "logprobs": logprobs_object(self._entries) if self._answer.logprobs else None,
            "finish_reason": reason if self._parser is None else self._parser.finish_name(reason),
            "stop_reason": self._last.stop_reason,
        }
        if self._answer.token_ids:
            choice["token_ids"] = self._token_ids
        return choice

    def _message(self) -> dict[str, Any]:
        text = "".join(self._texts)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._calls:
            # Beside calls OpenAI says null; otherwise a client may count on a string.
            message["content"] = text or None
            for call, arguments in zip(self._calls, self._arguments, strict=True):
                call["function"]["arguments"] = "".join(arguments)
            message["tool_calls"] = self._calls
        return message


async def build_completion(
    outputs: AsyncIterator[RequestOutput], choices: list[ChoiceBuilder], answer: Answer
) -> bytes:
    """The body, as JSON, once every choice has ended. Raises ServerError; the caller closes `outputs`."""
    num_open = len(choices)
    prompt_token_ids: list[int] | None = None
    async for output in outputs:
        choices[output.index].add(output)
        if output.prompt_token_ids is not None:
            prompt_token_ids = output.prompt_token_ids
        if output.finish_reason is None:
            continue
        num_open -= 1
        if num_open:
            continue
        body: dict[str, Any] = {
            "id": answer.id,
            "object": "chat.completion",
            "created": answer.created,
            "model": answer.model,
            "choices": [choice.build() for choice in choices],
            "usage": CompletionUsage.from_usage(output.usage).model_dump(),
            "system_fingerprint": answer.system_fingerprint,
        }
        if answer.has_service_tier:
            body["service_tier"] = "default"
        if answer.token_ids and prompt_token_ids is not None:
            body["prompt_token_ids"] = prompt_token_ids
        return msgspec.json.encode(body)
    raise RequestFailedError("the answer ended without a reason")
