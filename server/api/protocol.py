"""Wire types that endpoints share: the base of all bodies, stream options, token counts.

Unknown keys are accepted, an explicit null means absent at every level, and types are strict: no "0.5" for a number,
no true for 1.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from server.api.errors import from_validation_error
from server.errors import RequestFailedError
from server.types import FinishReason, RequestOutput, Usage

BodyType = TypeVar("BodyType", bound="Body")


class Body(BaseModel):
    """Base of all that a client sends."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_means_absent(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None}
        return data


def validate(kind: type[BodyType], body: dict[str, Any]) -> BodyType:
    """A JSON object → a body of that kind. Raises ClientError for the first thing that is wrong with it."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise from_validation_error(error) from None


class StreamOptions(Body):
    include_usage: bool = Field(default=False, description="End the stream with a chunk of token counts.")
    continuous_usage_stats: bool = Field(default=False, description="With include_usage: token counts on every chunk.")


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


def end_reason(output: RequestOutput) -> Literal["stop", "length"] | None:
    """Why this output is its answer's last, if it is. Raises RequestFailedError where the server ended the answer."""
    if output.finish_reason is None:
        return None
    if output.finish_reason is FinishReason.STOP:
        return "stop"
    if output.finish_reason is FinishReason.LENGTH:
        return "length"
    raise RequestFailedError("the request was ended by the server")
