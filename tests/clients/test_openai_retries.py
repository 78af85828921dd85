"""What the `openai` package does by itself when the server is full, or leaving."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.clients.conftest import NAMES, SMALL
from tests.clients.talk import MODEL, user
from tests.serving import Server, running_server

pytestmark = pytest.mark.clients

CHAT = "POST /v1/chat/completions"


@pytest.fixture
def narrow(checkpoint: Path, tmp_path: Path) -> Iterator[Server]:
    """A server with room for one request that runs and one that waits."""
    limits = ("--max-num-seqs", "1", "--max-num-queued-reqs", "1")
    with running_server(checkpoint, tmp_path / "log", *SMALL, *NAMES, *limits) as server:
        yield server


def answered(server: Server, status: int) -> int:
    """How many chat requests were answered so, by the server's own log, which is written a moment later."""
    time.sleep(1)
    return sum(f"{CHAT} {status}" in line for line in server.log.read_text().splitlines())


@contextlib.contextmanager
def long_stream(server: Server) -> Iterator[Iterator[str]]:
    body = {"messages": [user("Go on")], "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.base_url}/v1/chat/completions", json=body, timeout=120) as response:
        yield response.iter_lines()


class Crowd:
    """A request that runs and one that waits. They go once the server has sent somebody away `times` times."""

    def __init__(self, server: Server, times: int) -> None:
        self._server, self._times = server, times
        self._running, self._full = threading.Event(), threading.Event()
        self._stay = threading.Event()
        self._threads = [threading.Thread(target=self._occupy) for _ in range(2)]
        self._watch = threading.Thread(target=self._until_refused)

    def __enter__(self) -> Crowd:
        self._threads[0].start()
        assert self._running.wait(30)
        self._threads[1].start()
        deadline = time.monotonic() + 30
        while self._server.metric("num_requests_waiting") < 1:
            assert time.monotonic() < deadline, "the second request is not waiting"
            time.sleep(0.02)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stay.set()
        for thread in (*self._threads, self._watch):
            thread.join()

    def _occupy(self) -> None:
        with contextlib.suppress(httpx.TransportError), long_stream(self._server) as lines:
            for _ in lines:
                self._running.set()
                if self._stay.is_set():
                    return

    def _until_refused(self) -> None:
        while answered(self._server, 429) < self._times and not self._stay.wait(0.02):
            pass
        self._stay.set()


def ask(client: openai.OpenAI) -> Any:
    return client.chat.completions.create(model=MODEL, messages=[user("Hello")], max_completion_tokens=3)


def test_a_full_server_is_asked_again_until_it_answers(narrow: Server) -> None:
    with Crowd(narrow, times=1), openai.OpenAI(base_url=f"{narrow.base_url}/v1", api_key="EMPTY") as client:
        before = time.monotonic()
        answer = ask(client)
        waited = time.monotonic() - before
    assert answer.usage.completion_tokens <= 3
    assert answered(narrow, 429) >= 1
    assert waited >= 1, "Retry-After is a second at least"


def test_a_full_server_is_asked_again_in_asyncio_too(narrow: Server) -> None:
    async def chat() -> Any:
        async with openai.AsyncOpenAI(base_url=f"{narrow.base_url}/v1", api_key="EMPTY") as client:
            stream = await client.chat.completions.create(
                model=MODEL, messages=[user("Hello")], max_completion_tokens=3, stream=True
            )
            return [chunk async for chunk in stream]

    with Crowd(narrow, times=1):
        chunks = asyncio.run(chat())
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert answered(narrow, 429) >= 1


def test_a_server_that_stays_full_is_given_up(narrow: Server) -> None:
    """The wait is the server's: a Retry-After of more than two minutes would end the retries at once."""
    with (
        Crowd(narrow, times=100),
        openai.OpenAI(base_url=f"{narrow.base_url}/v1", api_key="EMPTY", max_retries=1) as client,
        pytest.raises(openai.RateLimitError) as caught,
    ):
        ask(client)
    assert answered(narrow, 429) == 2
    assert caught.value.type == "rate_limit_error"
    assert 1 <= float(caught.value.response.headers["retry-after"]) <= 120


def test_a_server_that_leaves_is_asked_again_and_given_up(checkpoint: Path, tmp_path: Path) -> None:
    grace = ("--shutdown-timeout", "8")
    with running_server(checkpoint, tmp_path / "log", *SMALL, *NAMES, *grace) as server, long_stream(server) as lines:
        next(lines)
        server.process.terminate()
        deadline = time.monotonic() + 10
        while httpx.get(f"{server.base_url}/health").status_code != 503:
            assert time.monotonic() < deadline, "the server does not drain"
            time.sleep(0.02)
        with (
            openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="EMPTY", max_retries=1) as client,
            pytest.raises(openai.InternalServerError) as caught,
        ):
            ask(client)
        assert caught.value.status_code == 503
        assert caught.value.code == "server_shutting_down"
        assert answered(server, 503) == 2
        assert "data: [DONE]" in list(lines), "the stream that ran before ends in good order"
