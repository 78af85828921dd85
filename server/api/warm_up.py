"""What the web framework makes on first use, made before anybody waits for it: half of a first answer's time."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from sse_starlette import EventSourceResponse
from starlette.types import Message, Scope

from server.errors import ServerError

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize")


async def warm_up(app: FastAPI) -> None:
    """Send each route a request that it refuses by its headers alone, and nowhere a stream of one event.

    Inside of all middlewares, so that nothing is counted or logged.
    """
    routes = AsyncExitStackMiddleware(app.router)  # which routes cannot do without
    for path in PATHS:
        with contextlib.suppress(ServerError):
            await routes(_scope(app, path), _nothing_to_read, _nobody_reads)
    await EventSourceResponse(_one_event())(_scope(app, ""), _nothing_to_read, _nobody_reads)


def _scope(app: FastAPI, path: str) -> Scope:
    return {
        "type": "http",
        "app": app,
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"text/plain")],
        "client": None,
        "server": None,
        "state": {},
    }


async def _one_event() -> AsyncIterator[bytes]:
    yield b": \n\n"


async def _nothing_to_read() -> Message:
    return {"type": "http.disconnect"}


async def _nobody_reads(message: Message) -> None:
    """Takes what is sent."""
