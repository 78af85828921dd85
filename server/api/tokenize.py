"""POST /tokenize and /detokenize: what the model would read, without asking it anything.

A conversation is parsed as the chat endpoint parses it, so that both always agree on its ids. Nothing is downloaded.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, Field, PlainValidator, RootModel, WithJsonSchema

from server.api.body import read_json_object
from server.api.chat.protocol import ChatCompletionRequest, parse_chat_request
from server.api.chat.routes import to_chat_input
from server.api.completions.protocol import check_token_ids, parse_token_ids
from server.api.errors import invalid_type, invalid_value, too_many
from server.api.models import check_model
from server.api.protocol import Body, validate
from server.api.schemas import EXAMPLE_IMAGE, error_answers, request_body
from server.types import ChatInput, PromptInput, SamplingParams

if TYPE_CHECKING:
    from server.config import ServerConfig
    from server.llm import AsyncLLM

MAX_DETOKENIZED = 131_072

_IDS_SCHEMA = {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": MAX_DETOKENIZED}


class TokenizeRequest(Body):
    """What both forms of POST /tokenize have."""

    model: str = Field("", max_length=1024, description="A served name; empty or absent means the first one.")
    return_token_strs: bool = Field(False, description="Tell each token's piece of the vocabulary.")


class TokenizePromptRequest(TokenizeRequest):
    """A text."""

    prompt: str
    add_special_tokens: bool = Field(True, description="Begin with BOS.")


class TokenizeChatRequest(ChatCompletionRequest):
    """A chat request, in full: its ids are those that the chat endpoint would answer it from."""

    return_token_strs: bool = Field(False, description="Tell each token's piece of the vocabulary.")


class TokenizeBody(RootModel[TokenizePromptRequest | TokenizeChatRequest]):
    """For the OpenAPI page."""


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


def _parse_tokens(raw: object) -> tuple[int, ...]:
    if not isinstance(raw, list):
        raise invalid_type("tokens", "an array of token ids")
    if len(raw) > MAX_DETOKENIZED:
        raise too_many("tokens", len(raw), limit=MAX_DETOKENIZED)
    return parse_token_ids(raw, "tokens") if raw else ()


class DetokenizeRequest(Body):
    """The body of POST /detokenize."""

    model: str = Field("", max_length=1024, description="A served name; empty or absent means the first one.")
    tokens: Annotated[tuple[int, ...], PlainValidator(_parse_tokens), WithJsonSchema(_IDS_SCHEMA)]


class Detokenized(BaseModel):
    prompt: str


def tokenize_router(llm: AsyncLLM, config: ServerConfig) -> APIRouter:
    router = APIRouter(tags=["Tokens"])
    model = llm.model_names[0]

    @router.post(
        "/tokenize",
        response_model=Tokens,
        openapi_extra=request_body(TokenizeBody, _tokenize_examples(model)),
        responses=error_answers(),
    )
    async def tokenize(request: Request) -> Response:
        """The ids of a text, or those that a chat request would be answered from, pictures' placeholders included."""
        given = await read_json_object(request)
        body = validate(TokenizeRequest, given)
        check_model(body.model or model, llm.model_names)
        ids = await llm.tokenize(_to_input(given, llm, inject_tools=config.inject_tools))
        strings = llm.token_strings(ids) if body.return_token_strs else None
        return _json(Tokens(count=len(ids), max_model_len=llm.max_model_len, tokens=ids, token_strs=strings))

    @router.post(
        "/detokenize",
        response_model=Detokenized,
        openapi_extra=request_body(DetokenizeRequest, _detokenize_examples(model)),
        responses=error_answers(),
    )
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens by their names."""
        body = validate(DetokenizeRequest, await read_json_object(request))
        check_model(body.model or model, llm.model_names)
        check_token_ids(body.tokens, "tokens", vocab_size=llm.vocab_size)
        return _json(Detokenized(prompt=await asyncio.to_thread(llm.detokenize, body.tokens)))

    return router


def _to_input(body: dict[str, Any], llm: AsyncLLM, *, inject_tools: bool) -> ChatInput | PromptInput:
    """Which of the two forms it is says the field that it has. Raises ClientError."""
    request_id = f"tok-{uuid.uuid4().hex}"
    if body.get("messages") is not None:
        if body.get("prompt") is not None:
            raise invalid_value("prompt", "and 'messages' exclude each other")
        chat = parse_chat_request(body)
        return to_chat_input(chat, request_id=request_id, vocab_size=llm.vocab_size, inject_tools=inject_tools)
    given = validate(TokenizePromptRequest, body)
    return PromptInput(
        request_id=request_id,
        prompt=given.prompt,
        sampling=SamplingParams(),
        add_special_tokens=given.add_special_tokens,
    )


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


def _tokenize_examples(model: str) -> dict[str, dict[str, Any]]:
    content = [{"type": "image_url", "image_url": {"url": EXAMPLE_IMAGE}}, {"type": "text", "text": "Which colour?"}]
    chat = {"model": model, "messages": [{"role": "user", "content": content}]}
    text = {"model": model, "prompt": "Once upon a time", "return_token_strs": True}
    return {
        "text": {"summary": "A text, with its tokens' names", "value": text},
        "chat": {"summary": "A conversation with a picture", "value": chat},
    }


def _detokenize_examples(model: str) -> dict[str, dict[str, Any]]:
    return {"ids": {"summary": "Ids to text", "value": {"model": model, "tokens": [1, 4326, 5151]}}}
