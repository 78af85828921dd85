from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from server.bench.client import Response, StreamClient
from tests.bench.canned import CannedServer


class Collector:
    def __init__(self) -> None:
        self.pieces: list[tuple[bytes, float]] = []

    def feed(self, data: bytes, now: float) -> None:
        self.pieces.append((data, now))

    @property
    def body(self) -> bytes:
        return b"".join(data for data, _ in self.pieces)


@contextmanager
def raw_server(*answers: bytes, close_after: bool = False) -> Iterator[str]:
    """Answers the requests of one connection with these bytes, one after the other, whatever is asked."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                for answer in answers:
                    request = b""
                    while b"\r\n\r\n" not in request:
                        request += connection.recv(65536)
                    connection.sendall(answer)
                if not close_after:
                    connection.recv(65536)  # until the client closes

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            thread.join()


def post(url: str, *, times: int = 1, timeout: float = 5.0) -> tuple[list[Response], Collector]:
    sink = Collector()

    async def main() -> list[Response]:
        async with StreamClient(url, headers={}, timeout=timeout) as client:
            return [await client.post(b"{}", sink) for _ in range(times)]

    return asyncio.run(main()), sink


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"


def test_hands_over_a_chunked_body_and_uses_the_connection_again() -> None:
    before = time.perf_counter()
    with raw_server(CHUNKED, CHUNKED) as url:  # a second connection would never be accepted
        responses, sink = post(url, times=2)
    assert [response.status for response in responses] == [200, 200]
    assert sink.body == b"abcdeabcde"
    assert all(before <= now <= time.perf_counter() for _, now in sink.pieces)


def test_an_idle_connection_is_not_used_again_once_it_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.bench.client.IDLE_SECONDS", 0.0)
    with CannedServer().running() as server:
        post(server.chat_url, times=3)
    assert len(server.clients) == 3


def test_a_connection_with_bytes_still_to_send_is_not_used_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            first, _ = listener.accept()
            first.recv(1000)
            first.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
            second, _ = listener.accept()
            second.recv(65536)
            second.sendall(CHUNKED)
            first.close()
            second.close()

        async def main() -> list[int]:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
            async with StreamClient(url, headers={}, timeout=5.0) as client:
                return [(await client.post(body, Collector())).status for body in (b"x" * 50_000_000, b"{}")]

        thread = threading.Thread(target=serve)
        thread.start()
        assert asyncio.run(main()) == [413, 200]
        thread.join()


def test_a_body_that_ends_with_the_connection_is_whole() -> None:
    with raw_server(b"HTTP/1.1 200 OK\r\n\r\nabc", close_after=True) as url:
        (response,), sink = post(url)
    assert response.status == 200
    assert sink.body == b"abc"


def test_an_interim_answer_is_not_the_answer() -> None:
    with raw_server(b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED) as url:
        (response,), sink = post(url)
    assert response.status == 200
    assert sink.body == b"abcde"


def test_the_body_of_a_refusal_is_returned_and_kept_from_the_sink() -> None:
    with raw_server(b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nbusy") as url:
        (response,), sink = post(url)
    assert response == Response(429, b"busy")
    assert sink.pieces == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (CHUNKED[:-5], "closed before the answer was complete"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", "closed before the answer was complete"),
        (b"", "closed before the answer was complete"),
        (b"SSH-2.0-OpenSSH\r\n", "not a valid HTTP answer"),
    ],
)
def test_a_cut_or_garbled_answer_is_an_error(answer: bytes, message: str) -> None:
    with raw_server(answer, close_after=True) as url, pytest.raises(ConnectionError, match=message):
        post(url)


def test_silence_is_an_error_after_the_timeout() -> None:
    with raw_server(CHUNKED[:-5]) as url, pytest.raises(TimeoutError, match=r"nothing arrived for 0\.05 s"):
        post(url, timeout=0.05)


def test_pieces_that_keep_coming_are_no_silence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n")
                for _ in range(8):
                    time.sleep(0.1)
                    connection.sendall(b"x")

        thread = threading.Thread(target=serve)
        thread.start()
        (response,), sink = post(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout=0.5)
        thread.join()
    assert response.status == 200
    assert sink.body == b"x" * 8
    assert sink.pieces[-1][1] - sink.pieces[0][1] > 0.5  # longer in all than the timeout


def test_refused_connection_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(OSError, match=r"refused|Connect"):
        post(f"http://127.0.0.1:{port}/")


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/", "127.0.0.1:8000", "http:///v1"])
def test_a_url_that_is_not_http_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="not an http"):
        StreamClient(url, headers={}, timeout=1.0)
