"""Answers that nobody reads: they are not kept for ever, and neither is the connection."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from server.connections import readers
from server.types import RequestOutput
from tests.api.scripted_llm import ScriptedLLM, say
from tests.connections.recorder import Recorder
from tests.connections.serving import Listening, connect, connected, head
from tests.listening import wait_until

WINDOW = 0.5
SIZE = 16 << 20  # more than the kernel takes for a reader


@pytest.fixture(autouse=True)
def _short_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "READ_SECONDS", WINDOW)


@pytest.fixture
def big() -> Iterator[Listening]:
    with connected(app=Recorder(b"a" * SIZE), keep_alive=0.1) as server:
        yield server


def is_cut(server: Listening, client: socket.socket, read: Callable[[], object] = lambda: None) -> None:
    """The server lets go of the client, which is still there and may read a little meanwhile."""
    wait_until(lambda: server.num_open == 1)
    deadline = time.monotonic() + 20 * WINDOW
    while server.num_open:
        assert time.monotonic() < deadline, "an answer that nobody reads is kept"
        read()
        time.sleep(0.05)
    assert client.fileno() >= 0


@pytest.mark.parametrize("lines", [(), ("Connection: close",)])
def test_a_big_answer_that_nobody_reads(big: Listening, lines: tuple[str, ...]) -> None:
    with connect(big.address, receive_buffer=4096) as client:
        client.sendall(head(*lines))
        is_cut(big, client)


def test_a_big_answer_that_is_read_a_byte_at_a_time(big: Listening) -> None:
    with connect(big.address, receive_buffer=4096) as client:
        client.sendall(head())
        is_cut(big, client, lambda: client.recv(1))


def test_a_client_that_has_said_all_and_reads_nothing(big: Listening) -> None:
    with connect(big.address, receive_buffer=4096) as client:
        client.sendall(head())
        time.sleep(0.1)
        client.shutdown(socket.SHUT_WR)
        is_cut(big, client)


@pytest.mark.parametrize("lines", [(), ("Connection: close",)])
def test_an_answer_that_fits_into_the_servers_own_buffer(
    lines: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left is less than makes a transport say that it is full, and closing waits for it all the same."""
    with connected(app=Recorder(b"a" * 30_000), keep_alive=0.1) as server:
        original = socket.socket.accept

        def accept(listening: socket.socket) -> tuple[socket.socket, object]:
            accepted, address = original(listening)
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
            return accepted, address

        monkeypatch.setattr(socket.socket, "accept", accept)
        with connect(server.address, receive_buffer=2048) as client:
            client.sendall(head(*lines))
            is_cut(server, client)


def test_a_steady_reader_gets_all_however_long_it_takes(big: Listening) -> None:
    with connect(big.address, receive_buffer=1 << 18) as client:
        client.sendall(head())
        started, received = time.monotonic(), 0
        while piece := client.recv(1 << 18):
            received += len(piece)
            time.sleep(0.02)
        assert time.monotonic() - started > 2 * WINDOW
    assert received > SIZE


def test_a_stream_that_nobody_reads() -> None:
    num_played = 0

    def endless() -> Iterator[RequestOutput | float]:
        nonlocal num_played
        for _ in range(10_000):
            num_played += 1
            yield say("x" * 16384)
            yield 0.0

    llm = ScriptedLLM(endless())  # type: ignore[arg-type]
    body = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "stream": True}).encode()
    lines = ("Content-Type: application/json", f"Content-Length: {len(body)}")
    request = head(*lines, method="POST", path="/v1/chat/completions")
    with connected(llm) as server, connect(server.address, receive_buffer=4096) as client:
        client.sendall(request + body)
        assert llm.closed.wait(20 * WINDOW)
        wait_until(lambda: server.num_open == 0)
        assert num_played < 50  # 800 KiB, in all the buffers on its way
