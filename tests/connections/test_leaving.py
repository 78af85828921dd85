"""The last answer on a connection: said to be so, and not lost however much of the request is still on its way."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from server.connections import protocol
from tests.connections.serving import Listening, connect, connected, head, read_all

SIZE = 3 << 20  # more than sockets hold


@pytest.fixture(scope="module")
def server() -> Iterator[Listening]:
    with connected(body_timeout=5) as found:
        yield found


def early(*lines: str) -> bytes:
    """The head of a request that is answered before its body is in."""
    return head(f"Content-Length: {SIZE}", *lines, method="POST", path="/nothing")


def drip(client: socket.socket) -> None:
    for _ in range(400):
        client.sendall(b"a")
        time.sleep(0.02)


def test_a_client_that_sends_all_before_it_reads(server: Listening) -> None:
    with connect(server.address) as client:
        client.sendall(early("Connection: close"))
        for _ in range(SIZE // 4096):
            client.sendall(b"a" * 4096)  # a reset would be seen here
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"connection: close" in answer


def test_a_client_that_does_not_stop_sending_is_cut_off(server: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 0.3)
    with connect(server.address) as client:
        client.sendall(early("Connection: close"))
        assert read_all(client).startswith(b"HTTP/1.1 404 ")
        with pytest.raises(ConnectionError):
            drip(client)


def test_what_is_sent_behind_the_last_request_is_not_answered(server: Listening) -> None:
    with connect(server.address) as client:
        client.sendall(early("Connection: close") + b"a" * SIZE + head())
        answers = read_all(client)
    assert answers.count(b"HTTP/1.1 ") == 1
