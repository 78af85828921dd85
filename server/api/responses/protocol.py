"""What a client may send to POST /v1/responses. Nothing is stored, so every request carries its whole conversation.

What comes back is in `responses_answer`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema

from server.api.errors import invalid_type, invalid_value, missing, too_many
from server.api.protocol import Body, StreamOptions, validate
from server.api.responses.input import parse_input
from server.api.responses.schemas import INPUT_SCHEMA, METADATA_SCHEMA
from server.api.responses.tools import TOOL_CHOICE_SCHEMA, FunctionTool
from server.api.sampling import MAX_INT32, SamplingRequest
from server.api.structured import ANY_OBJECT, schema_source
from server.api.tools import MAX_TOOLS
from server.api.unsupported import refuse_unsupported, unsupported_parameter, unsupported_value
from server.errors import ClientError
from server.types import GrammarSpec, ImageInput, TextPart, Turn

MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
MAX_LABEL_CHARS = 512

LOGPROBS = "message.output_text.logprobs"

# Fields that need a memory of earlier requests, or work that nobody waits for → the values that ask for nothing.
_NOT_SERVED: dict[str, tuple[object, ...]] = {
    "background": (False,),
    "conversation": (),
    "previous_response_id": (),
    "prompt": (),
}
# Fields of other endpoints that would constrain an answer → their name here.
_RENAMED = {
    "functions": "tools",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
}


def parse_metadata(raw: object) -> dict[str, str]:
    """At most 16 pairs of strings, which come back with the answer."""
    if not isinstance(raw, dict):
        raise invalid_type("metadata", "an object of strings")
    if len(raw) > MAX_METADATA_PAIRS:
        raise too_many("metadata", len(raw), limit=MAX_METADATA_PAIRS, what="pairs")
    for key, value in raw.items():
        if not isinstance(value, str):
            raise invalid_type("metadata", "an object of strings")
        if len(key) > MAX_METADATA_KEY_CHARS:
            raise invalid_value("metadata", f"must have keys of at most {MAX_METADATA_KEY_CHARS} characters")
        if len(value) > MAX_METADATA_VALUE_CHARS:
            raise invalid_value("metadata", f"must have values of at most {MAX_METADATA_VALUE_CHARS} characters")
    return raw


def _label(raw: object) -> str | None:
    """Clients put anything into the fields that only tell who they are. A short text comes back with the answer."""
    return raw if isinstance(raw, str) and len(raw) <= MAX_LABEL_CHARS else None


Label = Annotated[str | None, PlainValidator(_label), WithJsonSchema({})]


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = Field("response", pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = Field(None, max_length=1024)
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="Required with 'json_schema'.")
    strict: bool | None = Field(None, description="A schema is always kept to.")

    def to_grammar(self) -> GrammarSpec | None:
        """What the answer must match; None for plain text. Raises ClientError."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return GrammarSpec("json_schema", ANY_OBJECT, "text.format")
        param = "text.format.schema"
        if self.schema_ is None:
            raise missing(param)
        return GrammarSpec("json_schema", schema_source(self.schema_, param), param)

    def told(self) -> dict[str, Any]:
        """As it comes back with the answer."""
        if self.type != "json_schema":
            return {"type": self.type}
        return self.model_dump(by_alias=True)


class TextConfig(Body):
    format: TextFormat = Field(default_factory=lambda: TextFormat.model_validate({}))
    verbosity: str = Field("medium", max_length=64, description="Ignored.")


class ResponsesRequest(SamplingRequest):
    """The body of POST /v1/responses."""

    input: Annotated[tuple[Turn, ...], PlainValidator(parse_input), WithJsonSchema(INPUT_SCHEMA)]
    instructions: str | None = Field(None, description="Goes before the input, as a system message.")
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_INT32)
    text: TextConfig = Field(default_factory=lambda: TextConfig.model_validate({}))
    include: list[str] = Field([], max_length=32, description=f"'{LOGPROBS}'. For others there is nothing to include.")
    top_logprobs: int = Field(0, ge=0, le=20, description=f"Told only if 'include' has '{LOGPROBS}'.")
    tools: list[FunctionTool] = Field([], max_length=MAX_TOOLS)
    tool_choice: Any = Field("auto", json_schema_extra=TOOL_CHOICE_SCHEMA)
    parallel_tool_calls: bool = True
    max_tool_calls: int | None = Field(None, ge=0, le=MAX_INT32)
    metadata: Annotated[dict[str, str], PlainValidator(parse_metadata), WithJsonSchema(METADATA_SCHEMA)] = Field(
        default_factory=dict
    )
    store: bool = Field(False, description="Only false: nothing is stored.")
    when_too_long: Literal["auto", "disabled"] = Field(
        "disabled",
        alias="truncation",
        description="Nothing is ever dropped: an input that is too long is refused with either value.",
    )
    reasoning: Any = Field(None, description="Ignored.")
    service_tier: Any = Field(None, description="Answered with 'default'.")
    user: Label = None
    safety_identifier: Label = None
    prompt_cache_key: Label = None

    @property
    def turns(self) -> tuple[Turn, ...]:
        if not self.instructions:
            return self.input
        return (Turn(role="system", parts=(TextPart(self.instructions),)), *self.input)

    @property
    def num_logprobs(self) -> int | None:
        return self.top_logprobs if LOGPROBS in self.include else None


def parse_responses_request(body: dict[str, Any]) -> ResponsesRequest:
    """A JSON object → a request that this server can honour in full. Raises ClientError."""
    _refuse_fields(body)
    refuse_unsupported(body)
    _refuse_hosted_tools(body.get("tools"))
    request = validate(ResponsesRequest, body)
    if request.n > 1:
        raise unsupported_value("n", "only 1 is")
    if request.store:
        raise unsupported_value("store", "only false is")
    if request.return_token_ids:
        raise unsupported_parameter("return_token_ids")
    if request.stream_options.model_fields_set and not request.stream:
        raise invalid_value("stream_options", "may be given only when 'stream' is true")
    if request.truncate_prompt_tokens is not None and _has_images(request.input):
        # A cut could go through the middle of a picture.
        raise unsupported_parameter("truncate_prompt_tokens")
    return request


def _refuse_fields(body: dict[str, Any]) -> None:
    for name, harmless in _NOT_SERVED.items():
        if body.get(name) is not None and not any(body[name] is value for value in harmless):
            raise unsupported_parameter(name)
    for name, here in _RENAMED.items():
        if body.get(name) is not None:
            message = f"'{name}' is not a parameter of this endpoint; use '{here}'"
            raise ClientError(message, param=name, code="unsupported_parameter")
    for name in ("logprobs", "continue_final_message"):
        if body.get(name) not in (None, False):
            raise unsupported_parameter(name)


def _refuse_hosted_tools(tools: object) -> None:
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        if isinstance(tool, dict) and isinstance(tool.get("type"), str) and tool["type"] != "function":
            raise unsupported_value(f"tools[{index}].type", "only 'function' is")


def _has_images(turns: tuple[Turn, ...]) -> bool:
    return any(isinstance(part, ImageInput) for turn in turns for part in turn.parts)
