"""POST /v1/completions: prompts of text or token ids in, one answer or one stream out.

Knows the wire and the facade. Tokens and limits that need the model are `llm.prepare`'s; no template is involved.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING, Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.body import read_json_object, require_json
from server.api.completions.choices import Choices, Collector, EchoedPrompt, Wanted
from server.api.completions.protocol import (
    Completion,
    CompletionRequest,
    check_token_ids,
    completion_examples,
    parse_completion_request,
)
from server.api.completions.streaming import CompletionEncoder
from server.api.disconnect import close, unless_disconnected
from server.api.models import check_model
from server.api.origin import request_origin
from server.api.protocol import CompletionUsage
from server.api.sampling import to_sampling_params
from server.api.schemas import STREAM_CONTENT, error_answers, request_body
from server.api.streaming import EventStreamResponse, OpenStream
from server.errors import RequestFailedError
from server.types import EngineRequest, Logprob, PromptInput, RequestOrigin, RequestOutput

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from server.config import ServerConfig
    from server.llm import AsyncLLM

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def completions_router(llm: AsyncLLM, config: ServerConfig) -> APIRouter:
    router = APIRouter(tags=["Completions"])

    @router.post(
        "/v1/completions",
        response_model=Completion,
        openapi_extra=request_body(CompletionRequest, completion_examples(llm.model_names[0])),
        responses={200: {"content": STREAM_CONTENT}, **error_answers()},
    )
    async def create_completion(request: Request) -> Response:
        """Continue texts, without roles or pictures; with `stream`, as server-sent events."""
        origin = request_origin(request, timeout=config.request_timeout)
        require_json(request)
        llm.check_capacity(origin)
        body = parse_completion_request(await read_json_object(request))
        head: dict[str, Any] = {
            "id": body.answer_id("cmpl"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": check_model(body.model or llm.model_names[0], llm.model_names),
            "system_fingerprint": llm.system_fingerprint,
        }
        inputs = to_prompt_inputs(body, origin=origin, request_id=head["id"], llm=llm)
        if not body.stream:
            completion = await unless_disconnected(request.receive, _complete(llm, body, inputs, head))
            return Response(completion.model_dump_json(), media_type="application/json")
        work = _begin(llm, body, inputs, config.keep_alive_seconds)
        opened, choices = await unless_disconnected(request.receive, work)
        return EventStreamResponse(
            opened,
            encoder=CompletionEncoder(head, body.stream_options, choices),
            keep_alive_seconds=config.keep_alive_seconds,
        )

    return router


def to_prompt_inputs(
    request: CompletionRequest, *, origin: RequestOrigin, request_id: str, llm: AsyncLLM
) -> list[PromptInput]:
    """The request as the rest of the server knows it. Raises ClientError for token ids that do not exist."""
    sampling = to_sampling_params(
        request,
        max_tokens=request.output_cap,
        vocab_size=llm.vocab_size,
        num_logprobs=request.logprobs,
        num_prompt_logprobs=request.logprobs if request.echo else None,
    )
    if request.output_cap == 0:
        # A prompt is computed for the sake of a token, which nobody will see, and once for all `n`.
        sampling = msgspec.structs.replace(sampling, max_tokens=1, temperature=0.0)
    inputs = []
    for prompt, param in request.prompt:
        if not isinstance(prompt, str):
            check_token_ids(prompt, param, vocab_size=llm.vocab_size, image_token_ids=llm.image_token_ids)
        inputs.append(
            PromptInput(
                request_id=request_id,
                prompt=prompt,
                sampling=sampling,
                origin=origin,
                n=request.n,
                add_special_tokens=request.add_special_tokens is not False,
                truncation=request.truncation,
                priority=request.priority,
                cache_salt=request.cache_salt,
                param=param,
            )
        )
    return inputs


async def _start(
    llm: AsyncLLM, body: CompletionRequest, inputs: list[PromptInput]
) -> tuple[AsyncIterator[RequestOutput], Choices]:
    requests = [await llm.prepare(item) for item in inputs]
    wanted = Wanted(logprobs=body.logprobs is not None, token_ids=body.return_token_ids, answer=body.output_cap > 0)
    prompts = [
        await _echo(llm, item, request) if body.echo else EchoedPrompt(request.prompt_token_ids)
        for item, request in zip(inputs, requests, strict=True)
    ]
    return llm.generate(*requests), Choices(prompts, body.n, wanted)


async def _begin(
    llm: AsyncLLM, body: CompletionRequest, inputs: list[PromptInput], seconds: float
) -> tuple[OpenStream, Choices]:
    outputs, choices = await _start(llm, body, inputs)
    return await OpenStream.begin(outputs, seconds), choices


async def _complete(
    llm: AsyncLLM, body: CompletionRequest, inputs: list[PromptInput], head: dict[str, Any]
) -> Completion:
    outputs, choices = await _start(llm, body, inputs)
    collector = Collector()
    usage = None
    try:
        async for output in outputs:
            collector.add(choices.write(output))
            usage = output.usage
    finally:
        await close(outputs)
    if usage is None or len(collector.choices) < choices.count:
        raise RequestFailedError("the answer ended without a reason")
    return Completion(**head, choices=collector.choices, usage=CompletionUsage.from_usage(choices.usage(usage)))


async def _echo(llm: AsyncLLM, item: PromptInput, request: EngineRequest) -> EchoedPrompt:
    """A text comes back as it was sent; ids, and what is left of a text, as the text that they make."""
    ids = request.prompt_token_ids
    if isinstance(item.prompt, str) and item.truncation is None:
        text = item.prompt
    else:
        shown = [token_id for token_id in ids if token_id not in llm.special_token_ids]
        text = await asyncio.to_thread(llm.detokenize, shown)
    return EchoedPrompt(ids, text, _first_token(llm, ids[0]))


def _first_token(llm: AsyncLLM, token_id: int) -> Logprob:
    """The token that nothing is predicted for, in the words of those that follow it."""
    text = llm.detokenize([token_id])
    if token_id in llm.special_token_ids:
        return Logprob(token_id, text, b"", 0.0)
    byte = _BYTE_PIECE.fullmatch(llm.token_strings([token_id])[0])
    return Logprob(token_id, text, bytes([int(byte[1], 16)]) if byte else text.encode(), 0.0)
