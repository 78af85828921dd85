"""Reads a request's body as a JSON object: the part of parsing that is the same for every endpoint."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from pydantic_core import from_json

from server.errors import ClientError, MediaTypeError


def require_json(request: Request) -> None:
    """Raise MediaTypeError unless the request says that its body is JSON.

    A page in a browser cannot send that content type to another site unasked, which is a wall worth having.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise MediaTypeError("the header Content-Type must be application/json")


async def read_json_object(request: Request) -> dict[str, Any]:
    """Raises ClientError with code invalid_json for all that is not a JSON object.

    The parser refuses what Python's own lets through and what breaks things later: NaN, lone surrogates, invalid
    UTF-8, and nesting deeper than 200.
    """
    require_json(request)
    body = await request.body()
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        # Says what was expected and at which line and column, and repeats nothing of the body.
        raise ClientError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ClientError("the body must be a JSON object", code="invalid_json")
    return value
