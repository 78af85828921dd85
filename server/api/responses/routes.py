"""POST /v1/responses: one request in, one answer or one stream of named events out. Nothing is stored.

Knows the wire and the facade. Templates, images, tokens and limits that need the model are `llm.prepare`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.body import read_json_object, require_json
from server.api.disconnect import close, unless_disconnected
from server.api.models import check_model
from server.api.origin import request_origin
from server.api.responses.answer import Answer, Collector, ResponseObject
from server.api.responses.protocol import ResponsesRequest, parse_responses_request
from server.api.responses.schemas import responses_examples
from server.api.responses.streaming import ResponseEncoder
from server.api.responses.tools import plan_function_tools
from server.api.sampling import to_sampling_params
from server.api.schemas import STREAM_CONTENT, error_answers, request_body
from server.api.streaming import EventStreamResponse, OpenStream, encode
from server.api.tools import ToolPlan, prepare_with_tools
from server.errors import NotFoundError, RequestFailedError
from server.types import ChatInput, RequestOrigin

if TYPE_CHECKING:
    from server.config import ServerConfig
    from server.llm import AsyncLLM


def responses_router(llm: AsyncLLM, config: ServerConfig) -> APIRouter:
    router = APIRouter(tags=["Responses"])

    @router.post(
        "/v1/responses",
        response_model=ResponseObject,
        openapi_extra=request_body(ResponsesRequest, responses_examples(llm.model_names[0])),
        responses={200: {"content": STREAM_CONTENT}, **error_answers()},
    )
    async def create_response(request: Request) -> Response:
        """Answer an input of texts and pictures; with `stream`, as server-sent events."""
        origin = request_origin(request, timeout=config.request_timeout)
        require_json(request)
        llm.check_capacity(origin)
        body = parse_responses_request(await read_json_object(request))
        answer = Answer(request=body, model=check_model(body.model or llm.model_names[0], llm.model_names))
        tools = plan_function_tools(body.tools, body.tool_choice, parallel=body.parallel_tool_calls)
        chat = to_chat_input(
            body,
            tools,
            origin=origin,
            request_id=answer.id,
            vocab_size=llm.vocab_size,
            inject=config.inject_tools,
        )
        # A model that was not told of tools calls none, and what is constrained otherwise has no room for calls.
        if tools is not None and tools.mode == "auto" and (not config.inject_tools or chat.sampling.grammar):
            tools = None
        parser = None if tools is None else tools.parser()
        if not body.stream:
            work = _complete(llm, chat, tools, Collector(answer, parser))
            response = await unless_disconnected(request.receive, work)
            return Response(encode(response), media_type="application/json")
        opened = await unless_disconnected(request.receive, _begin(llm, chat, tools, config.keep_alive_seconds))
        return EventStreamResponse(
            opened, encoder=ResponseEncoder(answer, parser), keep_alive_seconds=config.keep_alive_seconds
        )

    @router.get("/v1/responses/{response_id}", include_in_schema=False)
    @router.delete("/v1/responses/{response_id}", include_in_schema=False)
    async def find_response(response_id: str) -> Response:
        raise NotFoundError("there is no such response: none is stored here", param="response_id")

    return router


def to_chat_input(
    request: ResponsesRequest,
    tools: ToolPlan | None,
    *,
    origin: RequestOrigin,
    request_id: str,
    vocab_size: int,
    inject: bool,
) -> ChatInput:
    """The request as the rest of the server knows it. `inject`: the model is told of the tools.

    Raises ClientError for token ids that do not exist, and for constraints that cannot hold together.
    """
    if tools is not None and tools.mode != "auto":
        # What is asked of the text says nothing of an answer that has none.
        request = request.model_copy(update={"response_format": None})
        grammar = tools.grammar()
    else:
        grammar = request.text.format.to_grammar()
    sampling = to_sampling_params(
        request,
        max_tokens=request.max_output_tokens,
        vocab_size=vocab_size,
        grammar=grammar,
        num_logprobs=request.num_logprobs,
    )
    turns = request.turns
    if tools is not None and inject and (tools.mode != "auto" or sampling.grammar is None):
        turns = (tools.described(), *turns)
    return ChatInput(
        request_id=request_id,
        turns=turns,
        origin=origin,
        sampling=sampling,
        truncation=request.truncation,
        priority=request.priority,
        cache_salt=request.cache_salt,
    )


async def _begin(llm: AsyncLLM, chat: ChatInput, tools: ToolPlan | None, seconds: float) -> OpenStream:
    return await OpenStream.begin(llm.generate(await prepare_with_tools(llm, chat, tools)), seconds)


async def _complete(llm: AsyncLLM, chat: ChatInput, tools: ToolPlan | None, collector: Collector) -> dict[str, Any]:
    outputs = llm.generate(await prepare_with_tools(llm, chat, tools))
    response = None
    try:
        async for output in outputs:
            response = collector.add(output)
    finally:
        await close(outputs)
    if response is None:
        raise RequestFailedError("the answer ended without a reason")
    return response
