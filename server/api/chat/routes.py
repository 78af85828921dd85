"""POST /v1/chat/completions: one request in, one answer or one stream out.

Knows the wire and the facade. Templates, images, tokens and limits that need the model are `llm.prepare`'s.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.body import read_json_object, require_json
from server.api.chat.answer import Answer, ChoiceBuilder, build_completion
from server.api.chat.chunks import ChunkEncoder
from server.api.chat.details import DetailedChunkEncoder
from server.api.chat.protocol import ChatCompletion, ChatCompletionRequest, parse_chat_request
from server.api.disconnect import close, unless_disconnected
from server.api.models import check_model
from server.api.origin import request_origin
from server.api.sampling import to_sampling_params
from server.api.schemas import STREAM_CONTENT, chat_examples, error_answers, request_body
from server.api.streaming import EventEncoder, EventStreamResponse, OpenStream
from server.api.tools import ToolPlan, prepare_with_tools
from server.types import ANYBODY, ChatInput, ImageInput, RequestOrigin, Turn

if TYPE_CHECKING:
    from server.config import ServerConfig
    from server.llm import AsyncLLM


def chat_router(llm: AsyncLLM, config: ServerConfig) -> APIRouter:
    router = APIRouter(tags=["Chat"])

    @router.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        openapi_extra=request_body(ChatCompletionRequest, chat_examples(llm.model_names[0])),
        responses={200: {"content": STREAM_CONTENT}, **error_answers()},
    )
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation, with pictures in the user's messages; with `stream`, as server-sent events."""
        origin = request_origin(request, timeout=config.request_timeout)
        require_json(request)
        llm.check_capacity(origin)
        body = parse_chat_request(await read_json_object(request))
        answer = Answer(
            id=body.answer_id("chatcmpl"),
            created=int(time.time()),
            model=check_model(body.model or llm.model_names[0], llm.model_names),
            system_fingerprint=llm.system_fingerprint,
            has_service_tier=body.service_tier is not None,
            logprobs=body.logprobs,
            token_ids=body.return_token_ids,
        )
        chat = to_chat_input(
            body,
            origin=origin,
            request_id=answer.id,
            vocab_size=llm.vocab_size,
            inject_tools=config.inject_tools,
        )
        tools = body.tool_plan(inject_tools=config.inject_tools)
        if not body.stream:
            work = _complete(llm, chat, tools, answer)
            completion = await unless_disconnected(request.receive, work)
            return Response(completion, media_type="application/json")
        opened = await unless_disconnected(request.receive, _begin(llm, chat, tools, config.keep_alive_seconds))
        return EventStreamResponse(
            opened, encoder=_encoder(body, tools, answer), keep_alive_seconds=config.keep_alive_seconds
        )

    return router


def to_chat_input(
    request: ChatCompletionRequest,
    *,
    request_id: str,
    vocab_size: int,
    inject_tools: bool = False,
    origin: RequestOrigin = ANYBODY,
) -> ChatInput:
    """The request as the rest of the server knows it. With `inject_tools` the model is told of the tools.

    Raises ClientError for token ids that do not exist, and for constraints that cannot hold together.
    """
    tools = request.tool_plan(inject_tools=inject_tools)
    if tools is not None and tools.mode != "auto":
        # What is asked of the content says nothing of an answer that has none.
        request = request.model_copy(update={"response_format": None})
    sampling = to_sampling_params(
        request,
        max_tokens=request.output_cap,
        vocab_size=vocab_size,
        grammar=None if tools is None else tools.grammar(),
        num_logprobs=request.num_logprobs,
    )
    turns = request.messages
    if "do_image_splitting" in request.mm_processor_kwargs:
        turns = _with_detail(turns, split=request.mm_processor_kwargs["do_image_splitting"])
    if tools is not None and inject_tools:
        turns = (tools.described(), *turns)
    return ChatInput(
        request_id=request_id,
        turns=turns,
        origin=origin,
        sampling=sampling,
        n=request.n,
        add_generation_prompt=request.opens_turn,
        continue_final_message=request.continue_final_message,
        truncation=request.truncation,
        priority=request.priority,
        cache_salt=request.cache_salt,
    )


def _with_detail(turns: tuple[Turn, ...], *, split: bool | None) -> tuple[Turn, ...]:
    """Pictures that leave their detail to the server, as the request as a whole would have them."""
    if split is None:
        return turns
    return tuple(
        msgspec.structs.replace(
            turn,
            parts=tuple(
                msgspec.structs.replace(part, detail="high" if split else "low")
                if isinstance(part, ImageInput) and part.detail == "auto"
                else part
                for part in turn.parts
            ),
        )
        for turn in turns
    )


async def _begin(llm: AsyncLLM, chat: ChatInput, tools: ToolPlan | None, seconds: float) -> OpenStream:
    return await OpenStream.begin(llm.generate(await prepare_with_tools(llm, chat, tools)), seconds)


async def _complete(llm: AsyncLLM, chat: ChatInput, tools: ToolPlan | None, answer: Answer) -> bytes:
    outputs = llm.generate(await prepare_with_tools(llm, chat, tools))
    parse_calls = None if tools is None else tools.parser
    choices = [ChoiceBuilder(index, answer, parse_calls and parse_calls()) for index in range(chat.n)]
    try:
        return await build_completion(outputs, choices, answer)
    finally:
        await close(outputs)


def _encoder(body: ChatCompletionRequest, tools: ToolPlan | None, answer: Answer) -> EventEncoder:
    head = answer.chunk_head()
    if tools is None and not answer.logprobs and not answer.token_ids:
        return ChunkEncoder(head, body.stream_options, num_choices=body.n)
    return DetailedChunkEncoder(
        head,
        body.stream_options,
        num_choices=body.n,
        logprobs=answer.logprobs,
        token_ids=answer.token_ids,
        parse_calls=None if tools is None else tools.parser,
        content_first="" if tools is None or tools.mode == "auto" else None,
    )
