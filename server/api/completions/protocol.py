"""The completions endpoint's wire types: what a client may send, what it gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema

from server.api.errors import invalid_type, invalid_value, too_many
from server.api.protocol import CompletionUsage, StreamOptions, validate
from server.api.sampling import MAX_INT32, SamplingRequest
from server.api.unsupported import refuse_unsupported, unsupported_parameter
from server.errors import ClientError

MAX_PROMPTS = 256
MAX_ANSWERS = 512  # of one request: its prompts times `n`
MAX_LOGPROBS = 20
DEFAULT_MAX_TOKENS = 16


class Prompt(NamedTuple):
    """A text or token ids, and where in the body they stand, for error messages."""

    value: str | tuple[int, ...]
    param: str


# What only this endpoint has, and would have to honour. An empty suffix is no suffix.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {"prompt_embeds": (), "suffix": ("",)}

_IDS_SCHEMA: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_TEXT_SCHEMA: dict[str, Any] = {"type": "string", "minLength": 1}
PROMPT_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {**_TEXT_SCHEMA, "title": "Text"},
        {**_IDS_SCHEMA, "title": "Token ids"},
        {
            "type": "array",
            "title": "Several prompts",
            "minItems": 1,
            "maxItems": MAX_PROMPTS,
            "items": {"anyOf": [_TEXT_SCHEMA, _IDS_SCHEMA]},
        },
    ],
    "description": "A text, which the tokenizer's BOS is put before, or token ids as they are; or several of them.",
}


def parse_prompts(raw: object) -> tuple[Prompt, ...]:
    """One prompt or several. Raises ClientError; which ids there are is known further down."""
    if isinstance(raw, list) and raw and isinstance(raw[0], str | list):
        if len(raw) > MAX_PROMPTS:
            raise too_many("prompt", len(raw), limit=MAX_PROMPTS, what="prompts")
        return tuple(_parse_prompt(prompt, f"prompt[{index}]") for index, prompt in enumerate(raw))
    return (_parse_prompt(raw, "prompt"),)


def _parse_prompt(raw: object, param: str) -> Prompt:
    if isinstance(raw, str):
        if not raw:
            raise invalid_value(param, "must not be empty")
        return Prompt(raw, param)
    if isinstance(raw, list):
        return Prompt(parse_token_ids(raw, param), param)
    raise invalid_type(param, "a string or an array of token ids")


def parse_token_ids(raw: list[Any], param: str) -> tuple[int, ...]:
    """Integers that fit 32 bits, of which there is at least one. Raises ClientError."""
    if not raw:
        raise ClientError(f"'{param}' must not be an empty array", param=param, code="empty_array")
    # A bool is an int in Python, but not in JSON.
    if any(type(token_id) is not int for token_id in raw):
        index = next(index for index, token_id in enumerate(raw) if type(token_id) is not int)
        raise invalid_type(f"{param}[{index}]", "an integer")
    if min(raw) < 0 or max(raw) > MAX_INT32:
        index = next(index for index, token_id in enumerate(raw) if not 0 <= token_id <= MAX_INT32)
        raise invalid_value(f"{param}[{index}]", "is not a token id")
    return tuple(raw)


def check_token_ids(
    token_ids: Sequence[int], param: str, *, vocab_size: int, image_token_ids: Sequence[int] = ()
) -> None:
    """Raise ClientError for an id that the model does not have, or that stands for a picture."""
    if max(token_ids, default=0) >= vocab_size:
        index, unknown = next(item for item in enumerate(token_ids) if item[1] >= vocab_size)
        raise invalid_value(f"{param}[{index}]", f"must be a token id below {vocab_size}, not {unknown}")
    if not set(image_token_ids).isdisjoint(token_ids):
        index, image = next(item for item in enumerate(token_ids) if item[1] in image_token_ids)
        raise invalid_value(f"{param}[{index}]", f"is {image}, which stands for a picture; a prompt can have none")


class CompletionRequest(SamplingRequest):
    """The body of POST /v1/completions."""

    prompt: Annotated[tuple[Prompt, ...], PlainValidator(parse_prompts), WithJsonSchema(PROMPT_SCHEMA)]
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    echo: bool = Field(False, description="Begin each answer with its prompt.")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Tell the log-probability of each token and of so many of the likeliest; with echo, the prompt's.",
    )
    max_tokens: int | None = Field(None, ge=0, le=MAX_INT32, description="Absent means 16; 0 only with echo.")
    max_completion_tokens: int | None = Field(None, ge=0, le=MAX_INT32, description="Another name of max_tokens.")

    @property
    def output_cap(self) -> int:
        given = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return DEFAULT_MAX_TOKENS if given is None else given


def parse_completion_request(body: dict[str, Any]) -> CompletionRequest:
    """A JSON object → a request that this server can honour in full. Raises ClientError."""
    refuse_unsupported(body, served=("echo",))
    for name, harmless in _UNSUPPORTED.items():
        if body.get(name) is not None and body[name] not in harmless:
            raise unsupported_parameter(name)
    request = validate(CompletionRequest, body)
    if request.stream_options.model_fields_set and not request.stream:
        raise invalid_value("stream_options", "may be given only when 'stream' is true")
    if request.output_cap == 0 and not request.echo:
        message = "'max_tokens' must be at least 1, not 0, unless 'echo' is true"
        raise ClientError(message, param="max_tokens", code="integer_below_min_value")
    answers = len(request.prompt) * request.n
    if answers > MAX_ANSWERS:
        raise invalid_value("n", f"times the number of prompts must be at most {MAX_ANSWERS}, not {answers}")
    return request


class CompletionLogprobs(BaseModel):
    """Four lists of one length. With echo, the first token of the prompt has neither number nor alternatives."""

    tokens: list[str] = Field(description="Bytes that are no text by themselves are spelt 'bytes:\\xe2'.")
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] = Field(
        description="The likeliest tokens, and the token itself where it is none of them."
    )
    text_offset: list[int] = Field(description="The character of the choice's text that the token begins at.")


def _is_none(value: object) -> bool:
    return value is None


# Absent unless asked for, and then a list.
TokenIds = Annotated[list[int] | None, WithJsonSchema({"type": "array", "items": {"type": "integer"}})]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = Field(description="The stop string or token id that ended the answer.")
    prompt_token_ids: TokenIds = Field(None, exclude_if=_is_none, description="With return_token_ids.")
    token_ids: TokenIds = Field(None, exclude_if=_is_none, description="With return_token_ids.")


class Completion(BaseModel):
    """The answer of POST /v1/completions without `stream`. Choices of the first prompt come first."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice] = Field(min_length=1)
    usage: CompletionUsage
    system_fingerprint: str


def completion_examples(model: str) -> dict[str, dict[str, Any]]:
    """Requests as OpenAPI shows them: a name → a summary and a body."""

    def example(summary: str, prompt: object, **fields: Any) -> dict[str, Any]:
        return {"summary": summary, "value": {"model": model, "prompt": prompt, **fields}}

    return {
        "text": example("A text to go on with", "Once upon a time", max_tokens=32, temperature=0),
        "batch": example("Several texts at once", ["One, two,", "Red, green,"], max_tokens=8, n=2, seed=1),
        "loglikelihood": example(
            "How likely a text is, without generating any", [[1, 4326, 5151]], max_tokens=0, echo=True, logprobs=1
        ),
        "regex": example("An answer of a given form", "The year is ", regex="[0-9]{4}", max_tokens=8),
        "streaming": example(
            "As events, with token counts", "A, B,", max_tokens=16, stream=True, stream_options={"include_usage": True}
        ),
    }
