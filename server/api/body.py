"""Reads a request's body as a JSON object: the part of parsing that is the same for every endpoint."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request
from pydantic_core import from_json

from server.errors import ClientError, MediaTypeError

# Commas and opening brackets in a body, also those within texts. Ten million values take seconds to parse, and nobody
# else is served meanwhile; a long conversation or all that may be detokenized at once has fewer than these.
MAX_SEPARATORS = 150_000
# A body with a picture takes milliseconds to join, parse and validate, and uploads that began together end together.
LARGE_BYTES = 256 << 10
# What the event loop reads of a connection at a time is at most 256 kB, which takes most of a millisecond.
LARGE_PIECE_BYTES = 64 << 10


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
    UTF-8, and nesting deeper than 200. What would take long to parse is refused before.
    """
    require_json(request)
    one_at_a_time: asyncio.Lock = request.app.state.parsing
    pieces: list[bytes] = []
    async for piece in request.stream():
        pieces.append(piece)
        if len(piece) >= LARGE_PIECE_BYTES:
            await _have_turn(one_at_a_time)  # no more of this body is read until then
    if sum(map(len, pieces)) >= LARGE_BYTES:
        await _have_turn(one_at_a_time)
    return _parse(b"".join(pieces))


async def _have_turn(one_at_a_time: asyncio.Lock) -> None:
    """Return in a turn of the event loop that nobody else returns in, so that its other work goes on in between."""
    async with one_at_a_time:
        await asyncio.sleep(0)


def _parse(body: bytes) -> dict[str, Any]:
    _check_size(body)
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        # Says what was expected and at which line and column, and repeats nothing of the body.
        raise ClientError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ClientError("the body must be a JSON object", code="invalid_json")
    return value


def _check_size(body: bytes) -> None:
    """Raises ClientError. Finding is quick where there is little to find, as in a picture of many megabytes."""
    if len(body) <= MAX_SEPARATORS:
        return
    left = MAX_SEPARATORS
    for separator in (b",", b"[", b"{"):
        position = body.find(separator)
        while position >= 0:
            left -= 1
            if left < 0:
                message = f"the body must have at most {MAX_SEPARATORS} commas and opening brackets, but has more"
                raise ClientError(message, code="too_many_values")
            position = body.find(separator, position + 1)
