"""A server that streams canned completions: what a test says, when it says it, on a loopback socket."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.listening import listening

DONE = b"data: [DONE]\n\n"


def event(payload: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def role() -> bytes:
    return event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})


def text(content: str, finish_reason: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish_reason}]})


def usage(prompt: int, completion: int, cached: int | None = None) -> bytes:
    counts: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if cached is not None:
        counts["prompt_tokens_details"] = {"cached_tokens": cached}
    return event({"choices": [], "usage": counts})


Step = bytes | float
# The pieces of an answer: bytes are sent, numbers are seconds to wait first, and an exception cuts the connection.
# Or a whole answer.
Answer = Sequence[Step | Exception] | Response
# Given the number of a request.
Script = Callable[[int], Answer]


def whole_answer(_: int) -> Answer:
    """Three tokens, the last 0.04 s after the request."""
    return [0.02, role() + text("one"), 0.01, text(" two"), 0.01, text(" three", "length"), usage(50, 3, 2) + DONE]


@dataclass
class CannedServer:
    """What the server saw. `url` is empty until it listens."""

    script: Script = whole_answer
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    clients: set[Any] = field(default_factory=set)
    in_flight: int = 0
    peak: int = 0
    count_tokens: Callable[[str], int] | None = None
    models: list[str] = field(default_factory=lambda: ["canned"])
    refusals_before_ready: int = 0
    refusal_status: int = 503
    metrics: Callable[[], str] | None = None

    @property
    def chat_url(self) -> str:
        return f"{self.url}/v1/chat/completions"

    async def chat(self, request: Request) -> Response:
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        self.arrivals.append(time.perf_counter())
        self.headers.append(dict(request.headers))
        self.clients.add(request.client)
        number = len(self.bodies)
        self.bodies.append(json.loads(await request.body()))
        answer = self.script(number)
        if isinstance(answer, Response):
            self.in_flight -= 1
            return answer
        return StreamingResponse(self._play(answer), media_type="text/event-stream")

    async def _play(self, steps: Sequence[Step | Exception]) -> AsyncIterator[bytes]:
        try:
            for step in steps:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, bytes):
                    yield step
                else:
                    await asyncio.sleep(step)
        finally:
            self.in_flight -= 1

    async def list_models(self, _: Request) -> Response:
        if self.refusals_before_ready > 0:
            self.refusals_before_ready -= 1
            return JSONResponse({"error": {"message": "loading"}}, status_code=self.refusal_status)
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    async def tokenize(self, request: Request) -> Response:
        if self.count_tokens is None:
            return JSONResponse({"error": {"message": "no such path"}}, status_code=404)
        return JSONResponse({"count": self.count_tokens((await request.json())["prompt"])})

    async def tell_metrics(self, _: Request) -> Response:
        return PlainTextResponse("no such path", 404) if self.metrics is None else PlainTextResponse(self.metrics())

    @contextmanager
    def running(self) -> Iterator[CannedServer]:
        app = Starlette(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/models", self.list_models),
                Route("/tokenize", self.tokenize, methods=["POST"]),
                Route("/metrics", self.tell_metrics),
            ]
        )
        with listening(app, log_level="critical") as self.url:
            yield self
