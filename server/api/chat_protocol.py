"""The chat endpoint's wire types: what a client may send, what it gets."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema

from server.api.errors import invalid_type, invalid_value, missing
from server.api.messages import parse_messages
from server.api.protocol import Body, CompletionUsage, StreamOptions, validate
from server.api.sampling import MAX_INT32, SamplingRequest
from server.api.schemas import MESSAGES_SCHEMA
from server.api.unsupported import refuse_unsupported, unsupported_parameter, unsupported_value
from server.types import Turn

MAX_TOOLS = 128


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema", "structural_tag"] = Field(description="Only 'text' so far.")


class FunctionDefinition(Body):
    name: str = Field(min_length=1, max_length=64)


class ToolDefinition(Body):
    type: Literal["function", "custom"]
    function: FunctionDefinition | None = None


class ChatCompletionRequest(SamplingRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[tuple[Turn, ...], PlainValidator(parse_messages), WithJsonSchema(MESSAGES_SCHEMA)]
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    service_tier: Any = Field(None, description="Answered with 'default'.")

    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT32, description="Wins over max_tokens.")
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT32)

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


def parse_chat_request(body: dict[str, Any]) -> ChatCompletionRequest:
    """A JSON object → a request that this server can honour in full. Raises ClientError."""
    refuse_unsupported(body)
    request = validate(ChatCompletionRequest, body)
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
