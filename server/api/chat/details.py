"""The chunks of a chat answer that has more than text: log-probabilities, token ids, tool calls.

What an output brings besides text rides on the chunk of that text. Where text is held back, because it may become a
call, so is the rest, and the choice's next chunk has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import msgspec

from server.api.chat.chunks import ChunkEncoder
from server.api.protocol import StreamOptions
from server.api.streaming import END, encode
from server.api.tool_calls import CallArguments, CallParser, CallStart, Content, Piece
from server.types import Logprob, RequestOutput

# JSON has no infinity; clients know this number from OpenAI.
MIN_LOGPROB = -9999.0


def encode_logprobs(logprobs: Sequence[Logprob]) -> bytes:
    """The entries of an array, without its brackets, so that those of several outputs can be joined by commas."""
    return encode([_entry(logprob) | {"top_logprobs": [_entry(top) for top in logprob.top]} for logprob in logprobs])[
        1:-1
    ]


def logprobs_object(entries: Sequence[bytes]) -> msgspec.Raw:
    return msgspec.Raw(b'{"content":[' + b",".join(entry for entry in entries if entry) + b'],"refusal":null}')


def _entry(logprob: Logprob) -> dict[str, Any]:
    return {"token": logprob.token, "logprob": max(logprob.logprob, MIN_LOGPROB), "bytes": list(logprob.data)}


class DetailedChunkEncoder(ChunkEncoder):
    """`parse_calls` makes a parser for each choice, None where an answer is text. `content_first` is what the opening
    says of the content: null where there is sure to be none.
    """

    def __init__(
        self,
        head: dict[str, Any],
        options: StreamOptions,
        *,
        num_choices: int,
        logprobs: bool,
        token_ids: bool,
        parse_calls: Callable[[], CallParser] | None,
        content_first: Literal[""] | None,
    ) -> None:
        super().__init__(head, options, num_choices=num_choices)
        self._with_logprobs = logprobs
        self._with_token_ids = token_ids
        self._content_first = content_first
        self._choices = [_Choice(None if parse_calls is None else parse_calls()) for _ in range(num_choices)]

    def opening(self, first: RequestOutput) -> bytes:
        usage = self._usage(msgspec.structs.replace(first.usage, completion_tokens=0))
        delta = {"role": "assistant", "content": self._content_first}
        chunks = []
        for index in range(self.num_choices):
            choice = encode({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})
            ids = b""
            if index == 0 and first.prompt_token_ids is not None and self._with_token_ids:
                ids = b',"prompt_token_ids":' + encode(first.prompt_token_ids)
            chunks.append(self._head + choice + b"]" + ids + usage + b"}" + END)
        return b"".join(chunks)

    def content(self, output: RequestOutput) -> bytes:
        choice = self._choices[output.index]
        choice.hold(output, logprobs=self._with_logprobs)
        deltas = [_delta(piece) for piece in choice.pieces(output.text)]
        return b"".join(self._chunk(output, delta, last=delta is deltas[-1]) for delta in deltas)

    def finish(self, output: RequestOutput, reason: str) -> bytes:
        choice = self._choices[output.index]
        choice.hold(output, logprobs=self._with_logprobs)
        deltas = [_delta(piece) for piece in choice.pieces(output.text, ended=True)] or [{}]
        end: dict[str, Any] = {"finish_reason": choice.finish_name(reason)}
        if output.stop_reason is not None:
            end["stop_reason"] = output.stop_reason
        before = b"".join(self._chunk(output, delta) for delta in deltas[:-1])
        return before + self._chunk(output, deltas[-1], last=True, **end)

    def _chunk(self, output: RequestOutput, delta: dict[str, Any], *, last: bool = False, **end: str | int) -> bytes:
        """What was held rides on the last chunk that an output makes."""
        choice: dict[str, Any] = {"index": output.index, "delta": delta, "logprobs": None, "finish_reason": None}
        choice.update(end)
        if last:
            entries, token_ids = self._choices[output.index].release()
            if entries:
                choice["logprobs"] = logprobs_object(entries)
            if self._with_token_ids:
                choice["token_ids"] = token_ids
        return self._head + encode(choice) + b"]" + self._usage(output.usage) + b"}" + END


class _Choice:
    """One choice of a stream: how it is read, and what waits for its next chunk."""

    def __init__(self, parser: CallParser | None) -> None:
        self._parser = parser
        self._entries: list[bytes] = []
        self._token_ids: list[int] = []

    def hold(self, output: RequestOutput, *, logprobs: bool) -> None:
        self._token_ids += output.token_ids
        if logprobs and output.logprobs:
            self._entries.append(encode_logprobs(output.logprobs))

    def release(self) -> tuple[list[bytes], list[int]]:
        held = self._entries, self._token_ids
        self._entries, self._token_ids = [], []
        return held

    def pieces(self, text: str, *, ended: bool = False) -> list[Piece]:
        if self._parser is None:
            return [Content(text)] if text else []
        return self._parser.push(text) + (self._parser.flush() if ended else [])

    def finish_name(self, reason: str) -> str:
        given = cast(Literal["stop", "length"], reason)
        return reason if self._parser is None else self._parser.finish_name(given)


def _delta(piece: Piece) -> dict[str, Any]:
    """The id and the name come once: clients join what they get."""
    match piece:
        case Content(text=text):
            return {"content": text}
        case CallStart(index=index, id=call_id, name=name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case CallArguments(index=index, text=text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
