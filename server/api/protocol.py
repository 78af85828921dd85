"""The chat endpoint's wire types: what a client may send, what it gets.

A request that parses is within every bound that can be told without the model. Unknown keys are accepted, an
explicit null means absent at every level, and types are strict: no "0.5" for a number, no true for 1.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from server.api.errors import (
    from_validation_error,
    invalid_type,
    invalid_value,
    missing,
    too_many,
)
from server.api.messages import parse_messages
from server.api.schemas import LOGIT_BIAS_SCHEMA, MESSAGES_SCHEMA, STOP_SCHEMA
from server.api.unsupported import refuse_unsupported, unsupported_parameter, unsupported_value
from server.errors import ClientError
from server.types import FinishReason, Turn, Usage

MAX_INT32 = 2**31 - 1
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIASES = 300
MAX_TOOLS = 128

_TOKEN_ID = re.compile(r"[0-9]{1,10}")


def parse_stop(raw: object) -> tuple[str, ...]:
    """One string or a list of at most four; none may be empty, for it would stop every answer at once."""
    if isinstance(raw, str):
        stops = [("stop", raw)]
    elif isinstance(raw, list):
        if len(raw) > MAX_STOPS:
            raise too_many("stop", len(raw), limit=MAX_STOPS)
        stops = [(f"stop[{index}]", stop) for index, stop in enumerate(raw)]
    else:
        raise invalid_type("stop", "a string or an array of strings")
    for param, stop in stops:
        if not isinstance(stop, str):
            raise invalid_type(param, "a string")
        if not stop:
            raise invalid_value(param, "must not be empty")
        if len(stop) > MAX_STOP_CHARS:
            message = f"'{param}' must have at most {MAX_STOP_CHARS} characters, but has {len(stop)}"
            raise ClientError(message, param=param, code="string_above_max_length")
    return tuple(stop for _, stop in stops)


def parse_logit_bias(raw: object) -> dict[int, float]:
    """Token ids, as strings, to what is added to their logits. The caller knows how many ids there are."""
    if not isinstance(raw, dict):
        raise invalid_type("logit_bias", "an object")
    if len(raw) > MAX_LOGIT_BIASES:
        raise too_many("logit_bias", len(raw), limit=MAX_LOGIT_BIASES, what="entries")
    biases = {}
    for token_id, bias in raw.items():
        if not isinstance(token_id, str) or not _TOKEN_ID.fullmatch(token_id):
            raise invalid_value("logit_bias", "must have token ids as its keys")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise invalid_type("logit_bias", "an object of numbers")
        if not -100 <= bias <= 100:
            raise invalid_value("logit_bias", "must have values from -100 to 100")
        biases[int(token_id)] = float(bias)
    return biases


class Body(BaseModel):
    """Base of all that a client sends."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_means_absent(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data


class StreamOptions(Body):
    include_usage: bool = Field(default=False, description="End the stream with a chunk of token counts.")
    continuous_usage_stats: bool = Field(default=False, description="With include_usage: token counts on every chunk.")


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema", "structural_tag"] = Field(description="Only 'text' so far.")


class FunctionDefinition(Body):
    name: str = Field(min_length=1, max_length=64)


class ToolDefinition(Body):
    type: Literal["function", "custom"]
    function: FunctionDefinition | None = None


class ChatCompletionRequest(Body):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[tuple[Turn, ...], PlainValidator(parse_messages), WithJsonSchema(MESSAGES_SCHEMA)]
    model: str = Field("", max_length=1024, description="A served name; empty or absent means the first one.")
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    service_tier: Any = Field(None, description="Answered with 'default'.")

    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT32, description="Wins over max_tokens.")
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT32)
    min_tokens: int | None = Field(None, ge=0, le=MAX_INT32)
    min_new_tokens: int | None = Field(None, ge=0, le=MAX_INT32, description="Another name of min_tokens.")
    ignore_eos: bool = False
    stop: Annotated[tuple[str, ...], PlainValidator(parse_stop), WithJsonSchema(STOP_SCHEMA)] = ()
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, le=MAX_INT32)]], FailFast()] = Field(
        [], max_length=MAX_STOP_TOKEN_IDS
    )
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False, description="0 is greedy.")
    top_p: float = Field(1.0, ge=0, le=1, allow_inf_nan=False)
    top_k: int = Field(0, ge=-1, le=MAX_INT32, description="0 and -1: off.")
    min_p: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100, allow_inf_nan=False)
    presence_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: Annotated[dict[int, float], PlainValidator(parse_logit_bias), WithJsonSchema(LOGIT_BIAS_SCHEMA)] = {}
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="-1 means none.")
    priority: int = Field(0, ge=-(2**31), le=MAX_INT32, description="Lower runs first.")
    cache_salt: str = Field(
        "",
        min_length=1,
        max_length=128,
        pattern=r"^[^@/\\\x00]+$",
        description="Requests share cached prompts only with those of the same salt.",
    )

    n: int = Field(1, ge=1, le=16, description="Only 1 so far.")
    logprobs: bool = Field(False, description="Only false so far.")
    top_logprobs: int = Field(0, ge=0, le=20, description="Only 0 so far.")
    response_format: ResponseFormat | None = None
    tools: list[ToolDefinition] | None = Field(
        None, min_length=1, max_length=MAX_TOOLS, description="Only with tool_choice 'none' so far."
    )
    tool_choice: Any = None

    @property
    def output_cap(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def output_floor(self) -> int:
        given = self.min_new_tokens if self.min_tokens is None else self.min_tokens
        return given or 0


def parse_chat_request(body: dict[str, Any]) -> ChatCompletionRequest:
    """A JSON object → a request that this server can honour in full. Raises ClientError."""
    refuse_unsupported(body)
    try:
        request = ChatCompletionRequest.model_validate(body)
    except ValidationError as error:
        raise from_validation_error(error) from None
    _refuse_unsupported_values(request)
    _check_consistency(request)
    return request


def _refuse_unsupported_values(request: ChatCompletionRequest) -> None:
    if request.n > 1:
        raise unsupported_value("n", "only 1 is")
    if request.logprobs:
        raise unsupported_parameter("logprobs")
    if request.top_logprobs:
        raise unsupported_parameter("top_logprobs")
    if request.response_format is not None and request.response_format.type != "text":
        raise unsupported_value("response_format", "only the type 'text' is")
    choice = request.tool_choice
    if isinstance(choice, dict) or choice == "required":
        raise unsupported_value("tool_choice", "only 'none' is")
    if choice is not None and not isinstance(choice, str):
        raise invalid_type("tool_choice", "a string or an object")
    if choice not in (None, "none", "auto"):
        raise invalid_value("tool_choice", "must be 'none', 'auto', 'required' or an object")
    for index, tool in enumerate(request.tools or ()):
        if tool.type == "custom":
            raise unsupported_value(f"tools[{index}].type", "only 'function' is")
        if tool.function is None:
            raise missing(f"tools[{index}].function")
    if request.tools and choice != "none":
        raise unsupported_parameter("tools")


def _check_consistency(request: ChatCompletionRequest) -> None:
    if request.stream_options.model_fields_set and not request.stream:
        raise invalid_value("stream_options", "may be given only when 'stream' is true")
    if request.output_cap is not None and request.output_floor > request.output_cap:
        raise invalid_value("min_tokens", f"must be at most the {request.output_cap} tokens that the answer may have")


class PromptTokensDetails(BaseModel):
    cached_tokens: int
    image_tokens: int
    text_tokens: int
    audio_tokens: int = 0


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int = 0
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0
    audio_tokens: int = 0


class CompletionUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails

    @classmethod
    def from_usage(cls, usage: Usage) -> CompletionUsage:
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=usage.cached_tokens,
                image_tokens=usage.image_tokens,
                text_tokens=usage.prompt_tokens - usage.image_tokens,
            ),
            completion_tokens_details=CompletionTokensDetails(),
        )


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int = 0
    message: AssistantMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = Field(None, description="The stop string or token id that ended the answer.")


class ChatCompletion(BaseModel):
    """The answer of POST /v1/chat/completions without `stream`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: CompletionUsage
    system_fingerprint: str
    service_tier: Literal["default"] | None = Field(None, exclude_if=lambda tier: tier is None)


def finish_reason_name(reason: FinishReason) -> Literal["stop", "length"] | None:
    """The two reasons that a client may see; None for those that must have been raised as errors."""
    if reason is FinishReason.STOP:
        return "stop"
    return "length" if reason is FinishReason.LENGTH else None
