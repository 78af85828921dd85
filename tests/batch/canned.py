"""A server on a loopback socket that answers each request as a test says, and remembers what it was asked."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.listening import listening


def answer(name: str, tokens_in: int = 3, tokens_out: int = 2) -> Response:
    usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out}
    return JSONResponse({"echo": name, "usage": usage}, headers={"x-request-id": f"req-{name}"})


def refusal(status: int, **headers: str) -> Response:
    body = {"error": {"message": "no", "type": "some_error", "param": None, "code": "no"}}
    return JSONResponse(body, status_code=status, headers=headers)


def cut() -> Response:
    """Begins an answer and breaks the connection."""

    async def content() -> AsyncIterator[bytes]:
        yield b'{"echo'
        raise ConnectionError("cut by the test")

    return StreamingResponse(content(), media_type="application/json")


async def echo(name: str, attempt: int) -> Response:
    return answer(name)


# Given the name in the body of a request, and how often it was asked before.
Script = Callable[[str, int], Awaitable[Response]]


@dataclass
class CannedServer:
    """What the server saw. `url` is empty until it listens."""

    script: Script = echo
    url: str = ""
    asked: list[str] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    attempts: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    peak: int = 0

    async def post(self, request: Request) -> Response:
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            body = await request.body()
            name = json.loads(body)["name"]
            self.asked.append(name)
            self.paths.add(request.url.path)
            self.headers.append(dict(request.headers))
            self.bodies.append(body)
            self.attempts[name] += 1
            return await self.script(name, self.attempts[name] - 1)
        finally:
            self.in_flight -= 1

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": []})

    @contextmanager
    def running(self) -> Iterator[CannedServer]:
        routes: list[Any] = [Route("/{path:path}", self.post, methods=["POST"]), Route("/v1/models", self.models)]
        with listening(Starlette(routes=routes), log_level="critical") as self.url:
            yield self


async def slowly(name: str, attempt: int) -> Response:
    await asyncio.sleep(0.05)
    return answer(name)
