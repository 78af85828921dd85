"""How an error becomes an answer: OpenAI's error object for every path and status, and nothing else.

Knows FastAPI and pydantic. Does not decide what is an error: that is `server/errors.py` and whoever raises.
Messages name the parameter, the limit and, for numbers, the value; text that a client sent is never repeated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from server.errors import (
    AuthenticationError,
    CapacityError,
    ClientError,
    DeadlineError,
    MethodNotAllowedError,
    NotFoundError,
    ServerError,
    UnavailableError,
)

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

MAX_MESSAGE_CHARS = 1000

# OpenAI's SDK waits as long as Retry-After says, but gives up instead when that is more than two minutes.
MAX_RETRY_AFTER = 120

# What each of pydantic's type complaints asked for.
_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
}
# Complaint → (name of the limit in pydantic's context, how to say it, what the code says).
_BOUNDS = {
    "greater_than_equal": ("ge", "at least", "below_min_value"),
    "greater_than": ("gt", "greater than", "below_min_value"),
    "less_than_equal": ("le", "at most", "above_max_value"),
    "less_than": ("lt", "less than", "above_max_value"),
}
_LENGTHS = {
    "too_short": ("min_length", "at least", "items", "array_below_min_length"),
    "too_long": ("max_length", "at most", "items", "array_above_max_length"),
    "string_too_short": ("min_length", "at least", "characters", "string_below_min_length"),
    "string_too_long": ("max_length", "at most", "characters", "string_above_max_length"),
}


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """For the OpenAPI page; what is sent is `error_object`."""

    error: ErrorDetail


def error_object(error: ServerError) -> dict[str, dict[str, str | None]]:
    """The body of an error answer, which is also the event that ends a broken stream."""
    message = error.message
    if len(message) > MAX_MESSAGE_CHARS:
        message = message[: MAX_MESSAGE_CHARS - 1] + "…"
    return {"error": {"message": message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: ServerError, *, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The HTTP answer for an error, with what tells a client when and how to try again."""
    extra = dict(headers or {})
    if isinstance(error, CapacityError | UnavailableError):
        # Zero would make clients fall back to their own, shorter, guess.
        seconds = 1.0 if error.retry_after is None else error.retry_after
        extra["retry-after"] = str(min(max(math.ceil(seconds), 1), MAX_RETRY_AFTER))
    if isinstance(error, DeadlineError):
        # OpenAI's SDK takes a 408 for a reason to ask again; what took too long once would do so again.
        extra["x-should-retry"] = "false"
    if isinstance(error, AuthenticationError):
        extra["www-authenticate"] = "Bearer"
    return JSONResponse(error_object(error), status_code=error.status, headers=extra)


def internal_error() -> ServerError:
    """What a client is told about a fault of ours: nothing. The log has the rest under the request's id."""
    return ServerError("the server had an error while processing this request")


def invalid_type(param: str, expected: str) -> ClientError:
    return ClientError(f"'{param}' must be {expected}", param=param, code="invalid_type")


def missing(param: str) -> ClientError:
    return ClientError(f"missing required parameter: '{param}'", param=param, code="missing_required_parameter")


def invalid_value(param: str, requirement: str) -> ClientError:
    return ClientError(f"'{param}' {requirement}", param=param, code="invalid_value")


def too_many(param: str, count: int, *, limit: int, what: str = "items") -> ClientError:
    message = f"'{param}' must have at most {limit} {what}, but has {count}"
    return ClientError(message, param=param, code="array_above_max_length")


def from_validation_error(error: ValidationError) -> ClientError:
    """The first complaint only: an answer's size must not grow with what is wrong with a request."""
    return from_complaint(error.errors(include_url=False)[0])


def from_complaint(complaint: Mapping[str, Any]) -> ClientError:
    """One of pydantic's error dicts as ours."""
    kind = str(complaint["type"])
    param = param_path(complaint["loc"])
    context: Mapping[str, Any] = complaint.get("ctx") or {}
    if kind == "missing":
        return missing(param)
    if kind in _EXPECTED:
        return invalid_type(param, _EXPECTED[kind])
    if kind in _BOUNDS:
        key, words, suffix = _BOUNDS[kind]
        limit = context[key]
        noun = "integer" if isinstance(limit, int) else "decimal"
        given = _number(complaint.get("input"))
        return ClientError(f"'{param}' must be {words} {limit}{given}", param=param, code=f"{noun}_{suffix}")
    if kind in _LENGTHS:
        key, words, unit, code = _LENGTHS[kind]
        if kind == "too_short" and context.get("actual_length") == 0:
            return ClientError(f"'{param}' must not be an empty array", param=param, code="empty_array")
        return ClientError(f"'{param}' must have {words} {context[key]} {unit}", param=param, code=code)
    if kind == "literal_error":
        return invalid_value(param, f"must be one of {context['expected']}")
    return invalid_value(param, "is not valid")


def param_path(loc: Sequence[str | int]) -> str:
    """("messages", 0, "content") gives "messages[0].content"."""
    path = ""
    for step in loc:
        if isinstance(step, int):
            path += f"[{step}]"
        else:
            path += f".{step}" if path else step
    return path


def _number(value: object) -> str:
    """A number as part of a message; at most 32 characters, because integers in JSON have no limit."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    text = str(value)
    return f", not {text if len(text) <= 32 else text[:31] + '…'}"


def install_error_handlers(app: FastAPI) -> None:
    """Replace FastAPI's own answers. What nobody handles is answered by the outermost middleware."""

    async def on_server_error(request: Request, error: ServerError) -> Response:
        return error_response(error)

    async def on_validation_error(request: Request, error: RequestValidationError) -> Response:
        complaint = dict(error.errors()[0])
        complaint["loc"] = complaint["loc"][1:]  # FastAPI puts "path", "query" or "body" in front
        return error_response(from_complaint(complaint))

    async def on_http_exception(request: Request, error: HTTPException) -> Response:
        answer = error_response(_from_http_exception(error), headers=error.headers)
        answer.status_code = error.status_code
        if error.status_code == 405:
            answer.headers["allow"] = ", ".join(_allowed_methods(request))  # the framework names one route's only
        return answer

    # The framework's types say Exception, and its dispatch is by the class given here.
    app.add_exception_handler(ServerError, on_server_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, on_validation_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, on_http_exception)  # type: ignore[arg-type]


def _allowed_methods(request: Request) -> list[str]:
    """All methods that some route answers at this path."""

    def is_answered(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    return [method for method in _METHODS if is_answered(method)]


def _from_http_exception(error: HTTPException) -> ServerError:
    """FastAPI raises these for paths and methods that it does not know; the detail is never passed on."""
    if error.status_code == 404:
        return NotFoundError("there is nothing at this path")
    if error.status_code == 405:
        return MethodNotAllowedError("this path does not answer this method")
    if error.status_code < 500:
        return ClientError("the request cannot be answered", code="invalid_request")
    return internal_error()
