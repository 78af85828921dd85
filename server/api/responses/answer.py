"""What POST /v1/responses answers: the response object, whole or as it stands at some point of a stream.

What is sent is a dict; its type here is its documentation, and tests hold both together.
"""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, Field

from server.api.protocol import end_reason
from server.api.responses.items import EndStatus, FunctionCall, ItemBuilder, OutputMessage
from server.api.responses.protocol import ResponsesRequest
from server.api.responses.tools import TOOL_CHOICE_SCHEMA, FunctionTool
from server.api.tool_calls import CallParser
from server.types import RequestOutput, Usage


class InputTokensDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int = Field(description="Always 0: nobody pays for what a cache keeps.")
    image_tokens: int
    text_tokens: int


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(BaseModel):
    code: Literal["server_error"]
    message: str


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"]


class ResponseReasoning(BaseModel):
    effort: None
    summary: None


class ResponseText(BaseModel):
    format: dict[str, Any]
    verbosity: str


class ResponseObject(BaseModel):
    """The answer, and the settings that made it. Only a stream tells of one that is in progress or failed."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    background: Literal[False]
    completed_at: int | None
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[OutputMessage | FunctionCall]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: ResponseReasoning
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: ResponseText
    tool_choice: Any = Field(json_schema_extra=TOOL_CHOICE_SCHEMA)
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    metadata: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One response to be: what is the same in all that is said about it."""

    request: ResponsesRequest
    model: str
    id: str = field(default_factory=lambda: f"resp_{uuid.uuid4().hex}")
    created_at: int = field(default_factory=lambda: int(time.time()))

    def started(self) -> dict[str, Any]:
        """Before any output."""
        return self._object("in_progress")

    def ended(self, output: list[dict[str, Any]], *, status: EndStatus, usage: Usage) -> dict[str, Any]:
        """`output` are the items as they are sent."""
        return self._object(
            status,
            completed_at=int(time.time()) if status == "completed" else None,
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
            output=output,
            usage=_told_usage(usage),
        )

    def failed(self, message: str) -> dict[str, Any]:
        return self._object("failed", error={"code": "server_error", "message": message})

    def _object(self, status: str, **state: Any) -> dict[str, Any]:
        """`state` are the fields that change while the answer is made."""
        request = self.request
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "background": False,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "model": self.model,
            "output": [],
            "parallel_tool_calls": request.parallel_tool_calls,
            "previous_response_id": None,
            "prompt_cache_key": request.prompt_cache_key,
            "reasoning": {"effort": None, "summary": None},
            "safety_identifier": request.safety_identifier,
            "service_tier": "default",
            "store": False,
            "temperature": request.temperature,
            "text": {"format": request.text.format.told(), "verbosity": request.text.verbosity},
            "tool_choice": request.tool_choice,
            "tools": [tool.model_dump() for tool in request.tools],
            "top_logprobs": request.top_logprobs,
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": request.user,
            "metadata": request.metadata,
            **state,
        }


class Collector:
    """Collects the outputs of one answer that is not streamed. `parser` reads calls, None where it is text."""

    def __init__(self, answer: Answer, parser: CallParser | None) -> None:
        self._answer = answer
        self._items = ItemBuilder(parser)
        self._items.open()

    def add(self, output: RequestOutput) -> dict[str, Any] | None:
        """The answer, if this is its last output. Raises RequestFailedError where the server ended it."""
        reason = end_reason(output)
        self._items.push(output)
        if reason is None:
            return None
        status = end_status(reason)
        self._items.end(status)
        return self._answer.ended(self._items.wire(status), status=status, usage=output.usage)


def end_status(reason: str) -> EndStatus:
    return "incomplete" if reason == "length" else "completed"


def _told_usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": 0,
            "image_tokens": usage.image_tokens,
            "text_tokens": usage.prompt_tokens - usage.image_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
