"""A request has only so long, whatever it waits for, and then holds nothing any more."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from server.errors import CapacityError, DeadlineError
from server.types import RequestOrigin
from tests.factories import make_request
from tests.llm_server import CHAT, GatedExecutor, Server, collect, run
from tests.serving import Server as RealServer
from tests.serving import running_server

CHAT_PATH = "/v1/chat/completions"


def soon(seconds: float = 0.1) -> RequestOrigin:
    return RequestOrigin(deadline=time.monotonic() + seconds)


def test_while_its_pictures_are_loaded() -> None:
    async def scenario(server: Server) -> None:
        server.inputs.gate = asyncio.Event()
        with pytest.raises(DeadlineError) as caught:
            await server.llm.prepare(msgspec.structs.replace(CHAT, origin=soon()))
        assert (caught.value.status, caught.value.code) == (408, "request_timeout")
        assert server.llm.num_in_flight == 0

    run(Server(), scenario)


def test_in_the_queue_it_is_never_computed() -> None:
    async def scenario(server: Server) -> None:
        assert isinstance(server.executor, GatedExecutor)
        running = server.llm.generate(make_request(8, max_tokens=100))
        first = asyncio.ensure_future(anext(running))
        await server.until_entered()
        late = make_request(9, origin=soon())
        with pytest.raises(DeadlineError):
            await collect(server.llm, late)
        server.executor.gate.release(10_000)
        await first
        await running.aclose()  # type: ignore[attr-defined]
        await server.until_idle()
        planned = {item.request_id for step in server.executor.steps for item in step.scheduled}
        assert late.request_id not in planned

    run(Server(executor=GatedExecutor(), limits={"max_num_seqs": 1}), scenario)


def test_in_the_middle_of_an_answer_what_was_said_is_kept() -> None:
    async def scenario(server: Server) -> None:
        assert isinstance(server.executor, GatedExecutor)
        stream = server.llm.generate(make_request(8, max_tokens=100, origin=soon(0.5)))
        server.executor.gate.release(3)
        texts: list[str] = []

        async def read() -> None:
            async for output in stream:
                texts.append(output.text)

        with pytest.raises(DeadlineError):
            await read()
        assert len("".join(texts).split()) == 3
        assert server.llm.num_in_flight == 0
        server.executor.gate.release(10_000)
        await server.until_idle()

    run(Server(executor=GatedExecutor()), scenario)


def test_tokens_that_wait_are_counted_until_the_first_answer() -> None:
    async def scenario(server: Server) -> None:
        assert isinstance(server.executor, GatedExecutor)
        admission = server.llm._admission
        stream = server.llm.generate(make_request(30, max_tokens=5))
        first = asyncio.ensure_future(anext(stream))
        await server.until_entered()
        assert admission.num_queued_tokens == 30
        server.inputs.num_tokens = 30
        with pytest.raises(CapacityError, match=r"30 prompt tokens wait .* has 30, the limit is 40"):
            await server.llm.prepare(CHAT)
        server.inputs.num_tokens = 10
        await server.llm.prepare(CHAT)
        assert admission.num_queued_tokens == 30
        server.executor.gate.release(10_000)
        await first
        assert admission.num_queued_tokens == 0
        await stream.aclose()  # type: ignore[attr-defined]
        await server.until_idle()

    run(Server(executor=GatedExecutor(), max_num_queued_tokens=40), scenario)


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    log = tmp_path_factory.mktemp("deadlines") / "log"
    settings = ("--dtype", "float32", "--kv-cache-memory-gb", "0.25", "--request-timeout", "2")
    with running_server(tiny_checkpoint, log, *settings) as running:
        yield running


LONG = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2000, "ignore_eos": True}


def test_the_header_shortens_the_servers_time(server: RealServer) -> None:
    started = time.monotonic()
    answer = httpx.post(f"{server.base_url}{CHAT_PATH}", json=LONG, headers={"x-request-timeout": "0.3"}, timeout=30)
    assert answer.status_code == 408
    assert answer.json()["error"]["code"] == "request_timeout"
    assert answer.headers["x-should-retry"] == "false"
    assert time.monotonic() - started < 1.9
    server.wait_until_idle()


def test_without_a_header_and_with_a_longer_one_the_servers_own_time_counts(server: RealServer) -> None:
    for headers in ({}, {"x-request-timeout": "1000"}):
        answer = httpx.post(f"{server.base_url}{CHAT_PATH}", json=LONG, headers=headers, timeout=30)
        assert answer.status_code == 408
    server.wait_until_idle()


def test_a_stream_ends_with_an_error_event(server: RealServer) -> None:
    body = {**LONG, "stream": True}
    answer = httpx.post(f"{server.base_url}{CHAT_PATH}", json=body, headers={"x-request-timeout": "0.5"}, timeout=30)
    assert answer.status_code == 200
    *_, before_last, last = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    assert json.loads(before_last.removeprefix("data: "))["error"]["code"] == "request_timeout"
    assert last == "data: [DONE]"
    server.wait_until_idle()


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", "", "1e999"])
def test_a_header_that_is_no_time_is_refused(server: RealServer, value: str) -> None:
    answer = httpx.post(f"{server.base_url}{CHAT_PATH}", json=LONG, headers={"x-request-timeout": value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "x-request-timeout"
