"""One request after the other on a connection: in order, apart from each other, and no longer than it takes."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator

import pytest

from tests.api.scripted_llm import Hang, ScriptedLLM, say
from tests.connections.recorder import Recorder
from tests.connections.serving import Listening, connect, connected, error_of, head, read_all
from tests.listening import wait_until


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def server(recorder: Recorder) -> Iterator[Listening]:
    with connected(app=recorder, header_timeout=1, body_timeout=0.5, keep_alive=0.3) as found:
        yield found


def get(path: str, *lines: str) -> bytes:
    return head(*lines, path=path)


def post(body: bytes, *lines: str, path: str = "/") -> bytes:
    return head(*lines, f"Content-Length: {len(body)}", method="POST", path=path) + body


def paths(answers: bytes) -> list[str]:
    """Those that the recorder answered with, in order."""
    return re.findall(r"\r\n\r\n(/\w*)", answers.decode())


# -- pipelining ------------------------------------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_requests(server: Listening) -> None:
    with connect(server.address) as client:
        client.sendall(get("/late") + post(b"body", path="/b") + get("/c", "Connection: close"))
        assert paths(read_all(client)) == ["/late", "/b", "/c"]


@pytest.mark.parametrize("bad", [b"\0\0", b"GET / HTTP/1.1\r\nX: " + b"a" * 20_000 + b"\r\nY"])
def test_what_is_wrong_with_a_later_request_does_not_cut_into_an_earlier_answer(server: Listening, bad: bytes) -> None:
    with connect(server.address) as client:
        client.sendall(get("/late") + get("/b") + bad)
        answers = read_all(client)
    assert paths(answers) == ["/late", "/b"]
    error_of(answers, 431 if len(bad) > 16384 else 400)


def test_a_bad_body_of_a_later_request_is_not_answered_before_its_turn(server: Listening, recorder: Recorder) -> None:
    with connect(server.address) as client:
        client.sendall(get("/late") + head("Transfer-Encoding: chunked", method="POST", path="/bad") + b"zz\r\n")
        answers = read_all(client)
    assert paths(answers) == ["/late"]
    error_of(answers, 400)
    assert [path for _, path, _, _ in recorder.requests] == ["/late"]


def test_a_late_head_behind_a_running_request_has_its_time_afterwards(server: Listening) -> None:
    with connect(server.address) as client:
        started = time.monotonic()
        client.sendall(get("/late") + b"GET /b HT")
        answers = read_all(client)
    assert time.monotonic() - started > 1.4
    assert paths(answers) == ["/late"]
    error_of(answers, 408)


def test_few_requests_may_wait_for_their_turn(server: Listening) -> None:
    with connect(server.address) as client:
        client.sendall(get("/late") + get("/b") * 1000)
        answers = read_all(client)
    assert paths(answers) == ["/late"] + ["/b"] * 16
    assert error_of(answers, 400)["code"] == "too_many_requests"


@pytest.mark.parametrize("later", [b"", get("/b"), post(b"{}")])
def test_a_client_that_leaves_ends_the_running_request_whatever_waits_behind_it(
    server: Listening, recorder: Recorder, later: bytes
) -> None:
    with connect(server.address) as client:
        client.sendall(get("/never") + later)
        wait_until(lambda: recorder.requests)
        time.sleep(0.05)
    wait_until(lambda: recorder.disconnects == 1)


# -- one request is one request --------------------------------------------------------------------------------------


def test_what_follows_a_body_is_no_header(server: Listening, recorder: Recorder) -> None:
    """Proxies check headers, and leave trailers alone."""
    trailer = b"Authorization: Bearer stolen\r\nX-Request-Id: x\r\n"
    with connect(server.address) as client:
        request = head("Transfer-Encoding: chunked", "Connection: close", method="POST", path="/")
        client.sendall(request + b"2\r\n{}\r\n0\r\n" + trailer + b"\r\n")
        assert paths(read_all(client)) == ["/"]
    [(_, _, headers, body)] = recorder.requests
    assert body == b"{}"
    assert {name for name, _ in headers} == {b"host", b"transfer-encoding", b"connection"}


@pytest.mark.parametrize("upgrade", ["h2c", "websocket", "x"])
@pytest.mark.parametrize("apart", [False, True])
def test_a_wish_for_another_protocol_is_passed_over(
    server: Listening, recorder: Recorder, upgrade: str, *, apart: bool
) -> None:
    """Java's client has it in every first request. The parser would lose the body, or take it for a request."""
    smuggled = get("/smuggled")
    lines = ("Connection: Keep-Alive, Upgrade , HTTP2-Settings", f"Upgrade: {upgrade}", "HTTP2-Settings: AAMAAABkAAQ")
    first = post(smuggled, *lines, path="/a")
    with connect(server.address) as client:
        if apart:
            client.sendall(first[: -len(smuggled)])
            time.sleep(0.1)
            client.sendall(smuggled)
        else:
            client.sendall(first)
        client.sendall(get("/b", "Connection: upgrade", f"Upgrade: {upgrade}") + get("/c", "Connection: close"))
        read_all(client)
    assert [(path, body) for _, path, _, body in recorder.requests] == [("/a", smuggled), ("/b", b""), ("/c", b"")]
    names = [name for name, _ in recorder.requests[0][2]]
    assert names == [b"host", b"connection", b"http2-settings", b"content-length"]


# -- between requests ------------------------------------------------------------------------------------------------


def test_a_connection_is_kept_for_the_next_request_but_not_for_ever(server: Listening) -> None:
    with connect(server.address) as client:
        for path in ("/a", "/b", "/c"):
            time.sleep(0.1)
            client.sendall(get(path))
            assert paths(client.recv(65536)) == [path]
        started = time.monotonic()
        assert client.recv(65536) == b""
        assert 0.2 < time.monotonic() - started < 5


def test_a_body_that_nobody_waits_for_does_not_keep_a_connection() -> None:
    """The answer is out before the body is in: 404, 401 and the like."""
    with connected(body_timeout=0.4, keep_alive=60) as server, connect(server.address) as client:
        client.sendall(head("Content-Length: 1000", method="POST", path="/nothing"))
        answer = client.recv(65536)
        assert answer.startswith(b"HTTP/1.1 404 ")
        started = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() - started < 8:
                client.sendall(b"a")
                time.sleep(0.05)
        assert time.monotonic() - started < 5


def test_a_body_that_comes_after_its_answer_is_no_obstacle(server: Listening, recorder: Recorder) -> None:
    with connected(body_timeout=5, keep_alive=0.3) as server, connect(server.address) as client:
        client.sendall(head("Content-Length: 10", method="POST", path="/nothing"))
        assert client.recv(65536).startswith(b"HTTP/1.1 404 ")
        client.sendall(b"a" * 10 + get("/health/live"))
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert client.recv(65536) == b""  # the time between two requests runs, as always


def test_a_malformed_body_ends_the_request_that_waits_for_it(server: Listening, recorder: Recorder) -> None:
    with connect(server.address) as client:
        client.sendall(head("Transfer-Encoding: chunked", method="POST") + b"5\r\nhello\r\n")
        time.sleep(0.1)
        client.sendall(b"zz\r\n")
        assert error_of(read_all(client), 400)["code"] == "invalid_http"
    wait_until(lambda: recorder.disconnects == 1)


def test_a_stream_goes_on_while_its_client_sends_rubbish() -> None:
    llm = ScriptedLLM([say("Two"), 0.5, say(" cats."), Hang()])
    body = b'{"messages": [{"role": "user", "content": "Hi"}], "stream": true}'
    with connected(llm) as server:
        with connect(server.address) as client:
            client.sendall(post(body, "Content-Type: application/json", path="/v1/chat/completions") + b"\0" * 100)
            received = b""
            while b" cats." not in received:
                received += client.recv(65536)
        assert b"HTTP/1.1 400" not in received
        assert llm.closed.wait(5)
