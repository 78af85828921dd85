"""POST /v1/chat/completions: one request in, one answer or one stream out.

Knows the wire and the facade. Templates, images, tokens and limits that need the model are `llm.prepare`'s.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.api.body import read_json_object, require_json
from server.api.chat_protocol import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionRequest,
    parse_chat_request,
)
from server.api.disconnect import close, unless_disconnected
from server.api.models import check_model
from server.api.protocol import CompletionUsage, finish_reason_name
from server.api.sampling import to_sampling_params
from server.api.schemas import chat_example, request_body
from server.api.streaming import ChatEventResponse, ChunkEncoder
from server.errors import RequestFailedError
from server.types import ChatInput, RequestOutput

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from server.config import ServerConfig
    from server.llm import AsyncLLM


@dataclass(frozen=True)
class Answer:
    """What every piece of one answer says about itself."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    has_service_tier: bool

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


def chat_router(llm: AsyncLLM, config: ServerConfig) -> APIRouter:
    router = APIRouter(tags=["Chat"])

    @router.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        openapi_extra=request_body(ChatCompletionRequest, chat_example(llm.model_names[0])),
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation, with pictures in the user's messages; with `stream`, as server-sent events."""
        require_json(request)
        llm.check_capacity()
        body = parse_chat_request(await read_json_object(request))
        answer = Answer(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=check_model(body.model or llm.model_names[0], llm.model_names),
            system_fingerprint=llm.system_fingerprint,
            has_service_tier=body.service_tier is not None,
        )
        chat = to_chat_input(body, request_id=answer.id, vocab_size=llm.vocab_size)
        if not body.stream:
            completion = await unless_disconnected(request.receive, _complete(llm, chat, answer))
            return JSONResponse(completion.model_dump(mode="json"))
        first, rest = await unless_disconnected(request.receive, _begin(llm, chat))
        return ChatEventResponse(
            first,
            rest,
            encoder=ChunkEncoder(answer.chunk_head(), body.stream_options),
            keep_alive_seconds=config.keep_alive_seconds,
        )

    return router


def to_chat_input(request: ChatCompletionRequest, *, request_id: str, vocab_size: int) -> ChatInput:
    """The request as the rest of the server knows it. Raises ClientError for token ids that do not exist."""
    sampling = to_sampling_params(request, max_tokens=request.output_cap, vocab_size=vocab_size)
    return ChatInput(
        request_id=request_id,
        turns=request.messages,
        sampling=sampling,
        priority=request.priority,
        cache_salt=request.cache_salt,
    )


async def _begin(llm: AsyncLLM, chat: ChatInput) -> tuple[RequestOutput, AsyncIterator[RequestOutput]]:
    """The first output and those to come. Until there is a first one, an error can still be an HTTP status."""
    outputs = llm.generate(await llm.prepare(chat))
    async for first in outputs:
        return first, outputs
    raise RequestFailedError("the answer ended before it began")


async def _complete(llm: AsyncLLM, chat: ChatInput, answer: Answer) -> ChatCompletion:
    outputs = llm.generate(await llm.prepare(chat))
    texts: list[str] = []
    try:
        async for output in outputs:
            texts.append(output.text)
            if output.finish_reason is not None:
                return _completion(answer, "".join(texts), output)
    finally:
        await close(outputs)
    raise RequestFailedError("the answer ended without a reason")


def _completion(answer: Answer, text: str, last: RequestOutput) -> ChatCompletion:
    reason = None if last.finish_reason is None else finish_reason_name(last.finish_reason)
    if reason is None:
        raise RequestFailedError("the request was ended by the server")
    choice = ChatChoice(message=AssistantMessage(content=text), finish_reason=reason, stop_reason=last.stop_reason)
    return ChatCompletion(
        id=answer.id,
        created=answer.created,
        model=answer.model,
        choices=[choice],
        usage=CompletionUsage.from_usage(last.usage),
        system_fingerprint=answer.system_fingerprint,
        service_tier="default" if answer.has_service_tier else None,
    )
