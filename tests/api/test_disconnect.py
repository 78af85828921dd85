"""A client that leaves ends its request at every stage: the generator is closed, promptly, and it is counted."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from starlette.types import Message

from server.api import streaming
from server.api.chat.chunks import ChunkEncoder
from server.api.protocol import StreamOptions
from server.api.streaming import EventStreamResponse, OpenStream
from server.types import FinishReason, RequestOutput
from tests.api.chat.client import HELLO, post
from tests.api.scripted_llm import Hang, ScriptedLLM, say, serving
from tests.api.wire import CHAT, begin, read_until, send
from tests.listening import wait_until

SECONDS = 10.0


@pytest.fixture
def llm() -> ScriptedLLM:
    return ScriptedLLM()


@pytest.fixture
def url(llm: ScriptedLLM) -> Iterator[str]:
    with serving(llm) as address:
        yield address


def ask(url: str, *, stream: bool, receive_buffer: int | None = None) -> socket.socket:
    return send(url + CHAT, {"messages": HELLO, "stream": stream}, receive_buffer=receive_buffer)


def count(llm: ScriptedLLM, status: int) -> float:
    """Answers of the chat endpoint so far, by status."""
    return llm.http_count(handler=CHAT, method="POST", status=str(status))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("script", "end"), [("prepare_script", "prepare_ended"), ("script", "closed")])
def test_before_the_first_token(llm: ScriptedLLM, url: str, *, script: str, end: str, stream: bool) -> None:
    setattr(llm, script, [Hang()])
    ended: threading.Event = getattr(llm, end)
    with ask(url, stream=stream):
        assert llm.hanging.wait(5)
        assert not ended.is_set()
    assert ended.wait(SECONDS)
    wait_until(lambda: count(llm, 499) == 1)
    assert count(llm, 200) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_in_the_middle(llm: ScriptedLLM, url: str, *, stream: bool) -> None:
    llm.script = [say("Two"), Hang()]
    with ask(url, stream=stream) as client:
        if stream:
            read_until(client, b'"Two"')
        assert llm.hanging.wait(5)
        assert not llm.closed.is_set()
    assert llm.closed.wait(SECONDS)
    wait_until(lambda: count(llm, 499) == 1)
    assert count(llm, 200) == 0  # also the stream, whose status line said so


def test_while_tokens_flow(llm: ScriptedLLM, url: str) -> None:
    llm.script = [say("a"), 0.005] * 2000
    with ask(url, stream=True) as client:
        read_until(client, b'"a"')
    assert llm.closed.wait(SECONDS)
    wait_until(lambda: count(llm, 499) == 1)


def test_before_the_stream_has_begun() -> None:
    """The answer's own generator is never started then, so that its `finally` would never run."""
    closed = []

    async def outputs() -> AsyncIterator[RequestOutput]:
        try:
            yield say("Two")
            yield say(" cats.", FinishReason.STOP)
        finally:
            closed.append(True)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        await asyncio.Event().wait()

    async def run() -> None:
        opened = await OpenStream.begin(outputs(), 5)
        answer = EventStreamResponse(opened, encoder=ChunkEncoder({}, StreamOptions()), keep_alive_seconds=5)
        await answer({"type": "http", "method": "POST"}, receive, send)
        assert closed == [True]

    asyncio.run(run())


def test_while_the_body_is_sent(llm: ScriptedLLM, url: str) -> None:
    with begin(url + CHAT, "Content-Length: 1000") as client:
        client.sendall(b"{")
        time.sleep(0.05)
    wait_until(lambda: count(llm, 499) == 1)
    assert llm.chats == []


def test_a_reader_that_does_not_read(llm: ScriptedLLM, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not given more than the buffers hold, does not hold up others, and is given up after a while."""
    monkeypatch.setattr(streaming, "SEND_TIMEOUT_SECONDS", 0.5)
    played = []

    def endless() -> Iterator[object]:
        for _ in range(10_000):
            played.append(1)
            yield say("x" * 16384)

    llm.script = endless()  # type: ignore[assignment]
    with ask(url, stream=True, receive_buffer=4096):
        assert llm.preparing.wait(5)
        time.sleep(0.2)
        assert httpx.get(f"{url}/health/live").status_code == 200
        assert not llm.closed.is_set()
        assert llm.closed.wait(3)
        assert len(played) < 1000  # 16 MiB, of which the kernel takes most
        wait_until(lambda: count(llm, 499) == 1)


def test_others_go_on(llm: ScriptedLLM, url: str) -> None:
    llm.script = [say("Two"), 0.3, say(" cats.", FinishReason.STOP)]
    answers = []
    other = threading.Thread(target=lambda: answers.append(post(url, stream=True).text))
    other.start()
    with ask(url, stream=True) as client:
        read_until(client, b'"Two"')
    other.join()
    assert answers[0].endswith("data: [DONE]\n\n")
    wait_until(lambda: (count(llm, 499), count(llm, 200)) == (1, 1))


def test_a_stream_outlives_the_signal_to_stop() -> None:
    """SIGTERM means no new requests; the library under the streams would end the open ones at once."""
    program = """
import uvicorn
from tests.api.scripted_llm import ScriptedLLM, say
from server.api.app import build_app
from server.config import ServerConfig
from server.types import FinishReason

llm = ScriptedLLM((say("Two"), 1.5, say(" cats.", FinishReason.STOP)))
uvicorn.run(build_app(llm, ServerConfig()), port=0, access_log=False)
"""
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, cwd=root) as server:
        assert server.stderr is not None
        try:
            line = next(line for line in server.stderr if "running on" in line)
            with ask(line.split()[4], stream=True) as client:
                read_until(client, b'"Two"')
                server.send_signal(signal.SIGTERM)
                read_until(client, b"data: [DONE]")
            assert server.wait(5) in (0, -signal.SIGTERM)
        finally:
            server.kill()
