"""Saying no to a request whose body is still on its way, without waiting for it and without losing the answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from server.api.errors import error_response
from server.errors import ServerError

# How long a client that is refused may go on sending, so that it gets to read why.
LINGER_SECONDS = 5.0


async def refuse(
    error: ServerError, scope: Scope, receive: Receive, send: Send, *, headers: Mapping[str, str] | None = None
) -> None:
    """Answer at once. Where a body was announced, go on reading for a while, and let the connection end there:
    closing it on unread data would destroy the answer.
    """
    if not _has_body(Headers(scope=scope)):
        await error_response(error, headers=headers)(scope, receive, send)
        return
    answer = error_response(error, headers={**(headers or {}), "connection": "close"})
    await send({"type": "http.response.start", "status": answer.status_code, "headers": answer.raw_headers})
    await send({"type": "http.response.body", "body": answer.body, "more_body": True})
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while (await receive()).get("more_body", False):
                pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
