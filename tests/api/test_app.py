"""What holds for every path: errors in one shape, ids, limits, the log, and the endpoints that machines ask."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from starlette.types import Message, Receive, Scope, Send

from server.api.middleware import RequestMiddleware
from server.errors import EngineDeadError, UnavailableError
from server.types import StepStats
from tests.api.chat.client import HELLO, post
from tests.api.scripted_llm import TWO_CATS, ScriptedLLM, serving
from tests.api.wire import CHAT, begin
from tests.listening import wait_until

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return {"max_body_mb": 0.25}


def is_error(answer: httpx.Response, status: int, code: str) -> bool:
    error = answer.json()["error"]
    return (
        answer.status_code == status
        and error["code"] == code
        and set(answer.json()) == {"error"}
        and set(error) == {"message", "type", "param", "code"}
        and isinstance(error["message"], str)
        and "x-request-id" in answer.headers
    )


@pytest.mark.parametrize(
    "path", ["/v1", "/v1/nothing", "/v1/chat/completions/", "/v1/embeddings", "//v1/models", "/v1/models/a%0Ab"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_unknown_paths(url: str, method: str, path: str) -> None:
    assert is_error(httpx.request(method, url + path), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/chat/completions", "POST"),
        ("POST", "/v1/models", "GET"),
        ("PUT", "/health", "GET, HEAD"),
        ("PUT", "/ping", "GET, HEAD, POST"),
        ("POST", "/metrics", "GET"),
    ],
)
def test_wrong_methods(url: str, method: str, path: str, allow: str) -> None:
    answer = httpx.request(method, url + path)
    assert is_error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == allow


def test_models(url: str, llm: ScriptedLLM) -> None:
    body = httpx.get(f"{url}/v1/models").json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == list(llm.model_names)
    card = body["data"][0]
    assert isinstance(card.pop("created"), int)
    assert card == {
        "id": "idefics2-8b",
        "object": "model",
        "owned_by": "idefics2-server",
        "root": "HuggingFaceM4/idefics2-8b",
        "parent": None,
        "max_model_len": 4096,
    }


@pytest.mark.parametrize("path", ["idefics2-8b", "HuggingFaceM4/idefics2-8b", "HuggingFaceM4%2Fidefics2-8b"])
def test_one_model(url: str, path: str) -> None:
    answer = httpx.get(f"{url}/v1/models/{path}")
    assert answer.status_code == 200
    assert answer.json()["id"] == path.replace("%2F", "/")


@pytest.mark.parametrize("path", ["gpt-4", "a/b/c", "", "..%2F..%2Fetc"])
def test_no_such_model(url: str, path: str) -> None:
    assert is_error(httpx.get(f"{url}/v1/models/{path}"), 404, "model_not_found")


def test_sdk_models(client: openai.OpenAI) -> None:
    assert client.models.list().data[0].id == "idefics2-8b"
    assert client.models.retrieve("HuggingFaceM4/idefics2-8b").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("is_alive", "is_ready", "expected"),
    [
        (True, True, {"/health": 200, "/health/live": 200, "/health/ready": 200}),
        (True, False, {"/health": 503, "/health/live": 200, "/health/ready": 503}),
        (False, False, {"/health": 503, "/health/live": 503, "/health/ready": 503}),
    ],
)
def test_health(url: str, llm: ScriptedLLM, *, is_alive: bool, is_ready: bool, expected: dict[str, int]) -> None:
    llm.is_alive, llm.is_ready = is_alive, is_ready
    for path, status in expected.items():
        answer = httpx.get(url + path)
        if status == 200:
            assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
        else:
            # Alive, loaded and not draining: what is missing are workers for pictures.
            code = "image_worker_unavailable" if is_alive else "engine_unavailable"
            assert is_error(answer, 503, code)
            assert 1 <= int(answer.headers["retry-after"]) <= 120
    assert httpx.get(f"{url}/metrics").status_code == 200


def test_health_says_why(url: str, llm: ScriptedLLM) -> None:
    """Loading and draining have codes of their own, which only the facade can tell apart."""
    llm.is_ready = False
    llm.capacity_error = UnavailableError("the model is still loading", code="model_loading", retry_after=5.0)
    answer = httpx.get(f"{url}/health/ready")
    assert is_error(answer, 503, "model_loading")
    assert answer.headers["retry-after"] == "5"
    llm.is_alive = False
    llm.capacity_error = EngineDeadError("gone")
    assert is_error(httpx.get(f"{url}/health/live"), 503, "engine_unavailable")


# -- request ids and headers -----------------------------------------------------------------------------------------


def test_a_good_id_is_echoed(url: str) -> None:
    for given in ("abc-1.2_3", "x" * 128):
        assert httpx.get(f"{url}/health", headers={"x-request-id": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", [b"", b"a b", b"x" * 129, b"x" * 10_000, b"a\tb", b"\xc3\xa9", b"{}"])
def test_a_bad_id_is_replaced(url: str, given: bytes) -> None:
    answer = httpx.get(f"{url}/health", headers={b"x-request-id": given})
    assert answer.status_code == 200
    assert re.fullmatch("req_[0-9a-f]{32}", answer.headers["x-request-id"])


def test_two_requests_may_choose_one_id(url: str, llm: ScriptedLLM) -> None:
    """It is for the client's own logs and stands in the answer's id; the engine's ids are the input processor's."""
    for _ in range(2):
        body = {"messages": HELLO, "request_id": "same"}
        answer = httpx.post(url + CHAT, json=body, headers={"x-request-id": "other"})
        assert (answer.status_code, answer.json()["id"]) == (200, "chatcmpl-same")
        assert answer.headers["x-request-id"] == "other"


def test_openai_headers(url: str) -> None:
    for answer in (httpx.get(f"{url}/health"), httpx.get(f"{url}/nothing"), httpx.post(url + CHAT)):
        assert answer.headers["openai-version"] == "2020-10-01"
        assert int(answer.headers["openai-processing-ms"]) >= 0


# -- limits ----------------------------------------------------------------------------------------------------------


def test_a_body_over_the_limit(url: str) -> None:
    body = b'{"x":"' + b"a" * (1 << 20) + b'"}'
    answer = httpx.post(url + CHAT, content=body, headers=JSON)
    assert is_error(answer, 413, "request_too_large")
    assert "0.25 MiB" in answer.json()["error"]["message"]


def test_a_body_over_the_limit_in_chunks(url: str) -> None:
    pieces = (b"a" * 65536 for _ in range(16))
    answer = httpx.post(url + CHAT, content=pieces, headers=JSON)
    assert is_error(answer, 413, "request_too_large")


def test_a_body_at_the_limit(url: str) -> None:
    text = "a" * ((1 << 18) - len(b'{"messages":[{"role":"user","content":""}]}'))
    for extra, status in [("", 200), ("a", 413)]:
        body = '{"messages":[{"role":"user","content":"%s"}]}' % (text + extra)
        answer = httpx.post(url + CHAT, content=body, headers=JSON)
        assert answer.status_code == status


def test_a_declared_body_is_refused_before_it_is_sent(url: str) -> None:
    started = time.monotonic()
    with begin(url + CHAT, "Content-Length: 99999999999", "Expect: 100-continue", timeout=2) as client:
        answer = client.recv(65536)
        assert time.monotonic() - started < 1
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer
    assert b"100 Continue" not in answer


@pytest.mark.parametrize("framing", ["Content-Length: 8388608", "Transfer-Encoding: chunked"])
def test_a_client_that_sends_all_before_it_reads(url: str, framing: str) -> None:
    """Closing on what it still sends would reset the connection and destroy its answer."""
    with begin(url + CHAT, framing) as client:
        piece = b"a" * (1 << 20)
        for _ in range(8):
            client.sendall(piece if "Length" in framing else b"100000\r\n" + piece + b"\r\n")
        if "chunked" in framing:
            client.sendall(b"0\r\n\r\n")
        answer = b""
        while received := client.recv(65536):
            answer += received
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert answer.endswith(b"}")


def test_a_disconnect_after_the_answer_is_none() -> None:
    """Servers say "disconnect" to whoever receives after the end, too."""
    llm = ScriptedLLM()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})
        await receive()

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    scope = {"type": "http", "method": "GET", "path": "/", "raw_path": b"/", "headers": []}
    asyncio.run(RequestMiddleware(app, metrics=llm.metrics)(scope, receive, send))
    assert llm.http_count(handler="other", method="GET", status="200") == 1


def send_for(client: socket.socket, data: bytes, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        client.sendall(data)
        time.sleep(0.001)


def test_an_endless_body_is_cut_off(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets its answer, and then a little while to read it, but not for ever."""
    monkeypatch.setattr("server.api.refusal.LINGER_SECONDS", 0.3)
    with (
        begin(url + CHAT, "Transfer-Encoding: chunked", timeout=2) as client,
        pytest.raises((BrokenPipeError, ConnectionResetError)),
    ):
        send_for(client, b"4000\r\n" + b"a" * 0x4000 + b"\r\n", seconds=5)


@pytest.fixture(scope="module")
def hasty_url() -> Iterator[str]:
    with serving(ScriptedLLM(), body_timeout=0.4) as address:
        yield address


@pytest.mark.parametrize("framing", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"])
def test_a_body_that_does_not_end(hasty_url: str, path: str, framing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However steadily it comes: the time is for all of it."""
    monkeypatch.setattr("server.api.refusal.LINGER_SECONDS", 1.0)
    started = time.monotonic()
    answer = b""
    with begin(hasty_url + path, framing, timeout=0.05) as client:
        while True:
            assert time.monotonic() - started < 10
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                client.sendall(b"1\r\na\r\n" if "chunked" in framing else b"a")
            try:
                received = client.recv(65536)
            except TimeoutError:
                continue
            except ConnectionResetError:  # it goes on sending to a server that has heard enough
                break
            answer += received
            if not received:
                break
    error = json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert (error["type"], error["code"]) == ("timeout_error", "request_timeout")
    assert "0.4 seconds" in error["message"]
    assert b"connection: close" in answer


def test_an_answer_may_take_longer_than_a_body() -> None:
    with serving(ScriptedLLM([0.8, *TWO_CATS]), body_timeout=0.4) as address:
        for stream in (False, True):
            assert post(address, stream=stream).status_code == 200


# -- what is logged and counted --------------------------------------------------------------------------------------


def test_every_answer_is_counted_by_route(url: str, llm: ScriptedLLM) -> None:
    cases: list[tuple[str, str, dict[str, str]]] = [
        ("GET", "/v1/models/a/b", {"handler": "/v1/models/{model_id:path}", "method": "GET", "status": "404"}),
        ("GET", "/health/live", {"handler": "/health/live", "method": "GET", "status": "200"}),
        ("GET", "/some/path/of/mine", {"handler": "other", "method": "GET", "status": "404"}),
        ("PROPFIND", "/v1/models", {"handler": "/v1/models", "method": "other", "status": "405"}),
        ("POST", "/v1/chat/completions", {"handler": "/v1/chat/completions", "method": "POST", "status": "415"}),
    ]
    for method, path, labels in cases:
        before = llm.http_count(**labels)
        httpx.request(method, url + path)
        wait_until(lambda: llm.http_count(**labels) == before + 1)  # noqa: B023 - called at once
    assert "/some/path" not in llm.metrics.render()[0].decode()


def test_the_access_log(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        httpx.get(f"{url}/health")
        httpx.get(f"{url}/metrics")
        httpx.get(f"{url}/v1/models/a%0Ab?token=secret")
        post(url)
        wait_until(lambda: len([record for record in caplog.records if record.name == "server.access"]) == 2)
    lines = [record.getMessage() for record in caplog.records if record.name == "server.access"]
    assert re.fullmatch(r"GET /v1/models/a%0Ab 404 \d+ms", lines[0])
    assert re.fullmatch(r"POST /v1/chat/completions 200 \d+ms", lines[1])


def test_an_unexpected_error_is_logged_with_its_cause(
    url: str, llm: ScriptedLLM, caplog: pytest.LogCaptureFixture
) -> None:
    llm.script = [ZeroDivisionError("what went wrong")]
    answer = post(url)
    assert is_error(answer, 500, "internal_error")
    assert "wrong" not in answer.text
    record = next(record for record in caplog.records if record.exc_info)
    assert "what went wrong" in str(record.exc_info)


def test_metrics_endpoint(url: str, llm: ScriptedLLM) -> None:
    llm.metrics.record_step(StepStats(num_running=3))
    answer = httpx.get(f"{url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert 'idefics2:num_requests_running{model_name="idefics2-8b"} 3.0' in answer.text.splitlines()


def test_a_bad_host_header_changes_nothing(url: str) -> None:
    headers: dict[str, Any] = {"host": "evil.example/?x="}
    assert httpx.get(f"{url}/health", headers=headers).status_code == 200
    assert is_error(httpx.get(f"{url}/v1/models/x/", headers=headers), 404, "model_not_found")
