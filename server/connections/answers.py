"""An error as bytes for a socket: what is said to a client whose bytes never became a request."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus

from server.api.errors import error_response
from server.errors import ServerError


def raw_answer(error: ServerError, headers: Iterable[tuple[bytes, bytes]] = ()) -> bytes:
    """A whole HTTP/1.1 answer with OpenAI's error object, after which the connection is closed."""
    answer = error_response(error, headers={"connection": "close"})
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}".encode()]
    lines += [b"%s: %s" % pair for pair in (*headers, *answer.raw_headers)]
    return b"\r\n".join([*lines, b"", bytes(answer.body)])
