"""The chat endpoint's wire types: what a client may send, what it gets.

What is sent is written elsewhere, piece by piece; the types of answers here are its documentation, and tests hold
both together.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema

from server.api.chat.messages import parse_messages
from server.api.chat.tools import TOOL_CHOICE_SCHEMA, ToolDefinition, plan_tools
from server.api.errors import invalid_type, invalid_value
from server.api.protocol import CompletionUsage, StreamOptions, validate
from server.api.sampling import MAX_INT32, SamplingRequest
from server.api.schemas import MESSAGES_SCHEMA
from server.api.structured import find_grammar
from server.api.tools import MAX_TOOLS, ToolPlan
from server.api.unsupported import refuse_unsupported, unsupported_parameter
from server.types import ImageInput, TextPart, Turn

MAX_TOP_LOGPROBS = 20


class ChatCompletionRequest(SamplingRequest):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[tuple[Turn, ...], PlainValidator(parse_messages), WithJsonSchema(MESSAGES_SCHEMA)]
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    service_tier: Any = Field(None, description="Answered with 'default'.")

    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_INT32, description="Wins over max_tokens.")
    max_tokens: int | None = Field(None, ge=1, le=MAX_INT32)

    logprobs: bool = Field(False, description="Tell the log-probability of each token of the answer.")
    top_logprobs: int = Field(
        0, ge=0, le=MAX_TOP_LOGPROBS, description="And of so many of the likeliest; with logprobs only."
    )
    tools: list[ToolDefinition] = Field(default_factory=list, min_length=1, max_length=MAX_TOOLS)
    tool_choice: Any = Field(None, json_schema_extra=TOOL_CHOICE_SCHEMA)
    parallel_tool_calls: bool = Field(True, description="Whether an answer may have several calls.")

    add_generation_prompt: bool = Field(True, description="Open a turn of the assistant for the answer.")
    continue_final_message: bool = Field(False, description="Go on with the last message, which is the assistant's.")
    mm_processor_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Only {'do_image_splitting': bool}: what the detail 'auto' means."
    )

    @property
    def output_cap(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def opens_turn(self) -> bool:
        """Whether the answer is a turn of its own: a continued message has one already, unless both were asked for."""
        return self.add_generation_prompt and not self.continue_final_message

    def tool_plan(self, *, inject_tools: bool) -> ToolPlan | None:
        """How the answer may call functions; None where it is text. Raises ClientError.

        A model that is not told of its tools calls none by itself, and an answer that is constrained otherwise has no
        room for calls.
        """
        plan = plan_tools(self.tools, self.tool_choice, parallel=self.parallel_tool_calls)
        if plan is None or plan.mode != "auto" or (inject_tools and find_grammar(self) is None):
            return plan
        return None


def parse_chat_request(body: dict[str, Any]) -> ChatCompletionRequest:
    """A JSON object → a request that this server can honour in full. Raises ClientError."""
    refuse_unsupported(body, served=("add_generation_prompt", "mm_processor_kwargs"))
    request = validate(ChatCompletionRequest, body)
    _check_consistency(request)
    return request


def _check_consistency(request: ChatCompletionRequest) -> None:
    if request.stream_options.model_fields_set and not request.stream:
        raise invalid_value("stream_options", "may be given only when 'stream' is true")
    if request.top_logprobs and not request.logprobs:
        raise invalid_value("top_logprobs", "may be given only when 'logprobs' is true")
    if request.continue_final_message:
        _check_continuation(request)
    if request.truncate_prompt_tokens is not None and _has_images(request.messages):
        # A cut could go through the middle of a picture.
        raise unsupported_parameter("truncate_prompt_tokens")
    for key, value in request.mm_processor_kwargs.items():
        if key != "do_image_splitting":
            raise unsupported_parameter("mm_processor_kwargs")
        if not isinstance(value, bool | None):
            raise invalid_type("mm_processor_kwargs.do_image_splitting", "true or false")


def _check_continuation(request: ChatCompletionRequest) -> None:
    name = "continue_final_message"
    if "add_generation_prompt" in request.model_fields_set and request.add_generation_prompt:
        raise invalid_value(name, "and 'add_generation_prompt' must not both be true")
    last = request.messages[-1]
    if last.role != "assistant":
        raise invalid_value(name, "needs a last message with role 'assistant'")
    if not any(isinstance(part, TextPart) and part.text for part in last.parts):
        raise invalid_value(name, "needs a last message with text")


def _has_images(turns: tuple[Turn, ...]) -> bool:
    return any(isinstance(part, ImageInput) for turn in turns for part in turn.parts)


class CalledFunction(BaseModel):
    name: str
    arguments: str = Field(description="JSON, as the model wrote it.")


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(BaseModel):
    """`content` is null only beside calls."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] = Field(default_factory=list, min_length=1, description="Absent when there are none.")


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """`bytes` are exact also where a token is a part of a character; `token` then has U+FFFD."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class ChatChoice(BaseModel):
    index: int = 0
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: str | int | None = Field(description="The stop string or token id that ended the answer.")
    token_ids: list[int] = Field(default_factory=list, description="With return_token_ids.")


class ChatCompletion(BaseModel):
    """The answer of POST /v1/chat/completions without `stream`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice] = Field(min_length=1)
    usage: CompletionUsage
    system_fingerprint: str
    service_tier: Literal["default"] = Field("default", description="Only if the request had one.")
    prompt_token_ids: list[int] = Field(default_factory=list, description="With return_token_ids.")
