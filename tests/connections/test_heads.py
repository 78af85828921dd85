"""The head of a request: how long it may take, how much it may hold, and what is said about bytes that are none."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from tests.connections.serving import Listening, connect, connected, error_of, head, read_all

KIB = 1 << 10


@pytest.fixture(scope="module")
def patient() -> Iterator[Listening]:
    with connected() as server:
        yield server


@pytest.fixture(scope="module")
def hasty() -> Iterator[Listening]:
    with connected(header_timeout=0.5) as server:
        yield server


def dribble(client: socket.socket, data: bytes) -> bytes:
    """Send a byte at a time until the server has had enough; its answer."""
    client.settimeout(0.02)
    received = b""
    deadline = time.monotonic() + 10
    for byte in data:
        try:
            client.sendall(bytes([byte]))
            received += client.recv(65536)
        except TimeoutError:
            pass
        if received:
            break
        assert time.monotonic() < deadline
    client.settimeout(5)
    return received + read_all(client)


# -- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"GET /health/live HTTP/1.1\r\nX: " + b"a" * 10_000, b"\r\n" * 5_000, b""])
def test_a_head_that_does_not_end(hasty: Listening, data: bytes) -> None:
    with connect(hasty.address) as client:
        started = time.monotonic()
        error = error_of(dribble(client, data), 408)
        assert time.monotonic() - started < 5
    assert (error["type"], error["code"]) == ("timeout_error", "request_timeout")
    assert "0.5 seconds" in error["message"]


def test_the_head_of_a_second_request_that_does_not_end(hasty: Listening) -> None:
    with connect(hasty.address) as client:
        client.sendall(head())
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        error_of(dribble(client, head("X: " + "a" * 10_000)), 408)


def test_bytes_between_requests_do_not_keep_a_connection(hasty: Listening) -> None:
    with connect(hasty.address) as client:
        client.sendall(head())
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        client.sendall(b"\r\n")
        error_of(read_all(client), 408)


def test_a_head_in_small_pieces_is_a_head(patient: Listening) -> None:
    with connect(patient.address) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in head(path="/health/live?" + "a" * 1500):
            client.sendall(bytes([byte]))
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


# -- size ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_headers", "status"), [(64, 200), (65, 431), (1000, 431)])
def test_header_fields(patient: Listening, num_headers: int, status: int) -> None:
    lines = [f"X-{number}: a" for number in range(num_headers - 2)]
    with connect(patient.address) as client:
        client.sendall(head(*lines, "Connection: close"))
        answer = read_all(client)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    if status != 200:
        error = error_of(answer, 431)
        assert (error["code"], "64" in error["message"]) == ("headers_too_large", True)


@pytest.mark.parametrize("where", ["header", "url"])
@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize(("size", "status"), [(16 * KIB, 200), (16 * KIB + 1, 431)])
def test_bytes_of_a_head(patient: Listening, size: int, status: int, pieces: int, where: str) -> None:
    def build(fill: int) -> bytes:
        if where == "url":
            return head("Connection: close", path="/health/live?" + "a" * fill)
        return head("Connection: close", "X: " + "a" * fill)

    data = build(size - len(build(0)))
    assert len(data) == size
    with connect(patient.address) as client:
        step = -(-size // pieces)
        for start in range(0, size, step):
            client.sendall(data[start : start + step])
            time.sleep(0.01)
        assert read_all(client).startswith(f"HTTP/1.1 {status} ".encode())


CHUNKED = head(
    "Content-Type: application/json", "Transfer-Encoding: chunked", method="POST", path="/v1/chat/completions"
)
ENDLESS = {
    "a header": (b"GET / HTTP/1.1\r\nX: ", b"a" * KIB),
    "the name of a header": (b"GET / HTTP/1.1\r\n", b"a" * KIB),
    "the URL": (b"GET /", b"a" * KIB),
    "line breaks": (b"", b"\r\n" * 512),
    "headers": (b"GET / HTTP/1.1\r\n", b"X: " + b"a" * 1019 + b"\r\n"),
    "a trailer": (CHUNKED + b"1\r\n{\r\n0\r\nX: ", b"a" * KIB),
    "trailers": (CHUNKED + b"1\r\n{\r\n0\r\n", b"X: " + b"a" * 1019 + b"\r\n"),
    "the extension of a chunk": (CHUNKED + b"1;x=", b"a" * KIB),
}


@pytest.mark.parametrize("what", ENDLESS)
def test_endless(patient: Listening, what: str) -> None:
    """Nothing of it is kept: the answer comes when the limit is passed, and what is sent afterwards is thrown away."""
    start, more = ENDLESS[what]
    with connect(patient.address) as client:
        client.sendall(start)
        sent = 0
        client.settimeout(0.01)
        answer = b""
        while not answer:
            client.sendall(more)
            sent += len(more)
            assert sent < 64 * KIB
            try:
                answer = client.recv(65536)
            except TimeoutError:
                continue
        for _ in range(20):
            client.sendall(more)
        client.settimeout(10)
        error = error_of(answer + read_all(client), 431)
    assert sent > 15 * KIB
    assert error["code"] == "headers_too_large"


# -- what is no HTTP -------------------------------------------------------------------------------------------------


NOT_HTTP = {
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00",
    "zeros": b"\0" * 100,
    "SSH": b"SSH-2.0-OpenSSH_9.2p1\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a body of two lengths": head("Content-Length: 1", "Content-Length: 2", method="POST"),
    "a body of a length and in chunks": head("Content-Length: 1", "Transfer-Encoding: chunked", method="POST"),
    "chunks under another encoding": head("Transfer-Encoding: chunked, x", method="POST"),
    "a space before a colon": head("X : a"),
    "a folded header": head("X: a\r\n b"),
    "a zero byte in a header": head("X: a\0"),
    "line feeds alone": head().replace(b"\r", b""),
    "CONNECT": b"CONNECT x:443 HTTP/1.1\r\nHost: x:443\r\n\r\n",
    "a URL without a path": b"GET http://x HTTP/1.1\r\nHost: x\r\n\r\n",
    "a bad chunk": CHUNKED + b"zz\r\n",
}


@pytest.mark.parametrize("what", NOT_HTTP)
def test_what_is_no_http(patient: Listening, what: str) -> None:
    with connect(patient.address) as client:
        client.sendall(NOT_HTTP[what])
        error = error_of(read_all(client), 400)
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_http")


def test_what_was_refused_is_counted(patient: Listening) -> None:
    name = "http_requests_total{handler=other,method=other,status=400}"
    with connect(patient.address) as client:
        client.sendall(b"\0")
        read_all(client)
    before = patient.number(name)
    with connect(patient.address) as client:
        client.sendall(b"\0")
        read_all(client)
    assert patient.number(name) == before + 1


def test_the_answer_is_not_destroyed_by_what_is_sent_after(patient: Listening) -> None:
    """Closing on unread bytes resets a connection, and what was said on it is lost."""
    with connect(patient.address) as client:
        client.sendall(b"\0" * (4 << 20))
        time.sleep(0.2)
        error_of(read_all(client), 400)
