"""Who is let in: no spelling of a guarded path without a key, every path with one, and health for all."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from starlette.routing import Route
from starlette.types import Message, Scope

from server.api.access import AccessMiddleware
from server.api.app import build_app
from server.config import ServerConfig
from server.errors import QuotaError, RequestFailedError
from server.keys import load_keys
from tests.api.chat.client import HELLO
from tests.api.scripted_llm import ScriptedLLM, say, serving
from tests.api.spellings import GUARDED, NO_PATHS, ask
from tests.api.wire import CHAT, begin, read_until
from tests.listening import wait_until

ALICE, BOB = "sk-alice-canary-1234", "sk-bob-canary-12345"
WRONG = "sk-wrong-canary-1234"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
HEALTH = ("/health", "/health/live", "/health/ready", "/health/startup", "/ping")
OPEN = {("POST", "/ping"), *((method, path) for method in ("GET", "HEAD") for path in (*HEALTH, "/"))}


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    return {"api_key": [f"alice={ALICE}", BOB]}


@pytest.fixture
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url) as made:
        yield made


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def paths() -> list[str]:
    """Every path that the application answers, with something in place of what varies."""
    app = build_app(ScriptedLLM(), ServerConfig())  # type: ignore[arg-type]
    found = {re.sub(r"\{[^}]*\}", "x", route.path) for route in app.routes if isinstance(route, Route)}
    found |= {re.sub(r"\{[^}]*\}", "x", path) for path in app.openapi()["paths"]}
    assert {CHAT, "/v1/models/x", "/metrics", "/docs", "/openapi.json", "/tokenize", "/health"} <= found
    return sorted(found)


def is_refused(answer: httpx.Response) -> bool:
    return (
        answer.status_code == 401
        and answer.headers["www-authenticate"] == "Bearer"
        and "x-request-id" in answer.headers
        and (answer.request.method == "HEAD" or answer.json()["error"]["code"] == "invalid_api_key")
    )


# -- every route ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_without_a_right_key_no_path_answers_but_health_and_the_page(
    http: httpx.Client, llm: ScriptedLLM, method: str
) -> None:
    for path in [*paths(), "/", "/v1", "/nothing", "/docs/oauth2-redirect", "/health/x", "/metrics/", "/admin"]:
        for headers in ({}, bearer(WRONG), {"authorization": "Bearer"}):
            answer = http.request(method, path, headers=headers)
            if (method, path) in OPEN:
                assert answer.status_code == 200, path
            elif method == "OPTIONS":
                # What a browser asks first, which must not look like a wrong key. Nothing lies behind it.
                assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, POST")
            else:
                assert is_refused(answer), (path, answer.status_code)
    assert llm.chats == llm.prompts == []


@pytest.fixture(scope="module")
def without_keys() -> Iterator[httpx.Client]:
    with serving(ScriptedLLM()) as url, httpx.Client(base_url=url) as made:
        yield made


@pytest.mark.parametrize("method", METHODS)
def test_with_a_right_key_every_path_answers_as_if_there_were_no_keys(
    http: httpx.Client, without_keys: httpx.Client, method: str
) -> None:
    for path in [*paths(), "/", "/nothing", "/health/x"]:
        answer = http.request(method, path, headers=bearer(ALICE))
        assert answer.status_code == without_keys.request(method, path).status_code != 401, path


# -- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [f"Bearer {ALICE}", f"bearer {ALICE}", f"BEARER   {ALICE}", f"Bearer {BOB}"])
def test_right(http: httpx.Client, value: str) -> None:
    assert http.get("/v1/models", headers={"authorization": value}).status_code == 200


@pytest.mark.parametrize(
    "value",
    [
        *("", "Bearer", "Basic", ALICE, f"Basic {ALICE}", f"Token {ALICE}", f"Bearer: {ALICE}"),
        *(f"Bearer {ALICE} x", f"Bearer {ALICE},", f"Bearer {ALICE[:-1]}", f"Bearer alice={ALICE}", f"Bearer={ALICE}"),
        *(f"Bearer {ALICE}, Bearer {ALICE}", f"Bearer Bearer {ALICE}", f"Bearer {ALICE.upper()}", "Bearer alice"),
        *(f"Bearer\t{ALICE}", f'Bearer "{ALICE}"', "Bearer \xff\xfe", "Bearer " + "x" * 10_000),
    ],
)
def test_wrong(http: httpx.Client, value: str) -> None:
    answer = http.get("/v1/models", headers={b"authorization": value.encode("latin-1")})  # type: ignore[dict-item]
    assert is_refused(answer)
    assert answer.json()["error"] == {
        "message": "incorrect API key provided",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_api_key",
    }


def test_two_keys_are_none(http: httpx.Client) -> None:
    for other in (ALICE, BOB, WRONG):
        headers = [("authorization", f"Bearer {ALICE}"), ("authorization", f"Bearer {other}")]
        assert is_refused(http.get("/v1/models", headers=headers))


@pytest.mark.parametrize("name", ["x-api-key", "api-key", "cookie", "proxy-authorization", "x-authorization"])
def test_keys_elsewhere_are_not_looked_at(http: httpx.Client, name: str) -> None:
    answer = http.get(f"/v1/models?api_key={ALICE}", headers={name: f"Bearer {ALICE}"})
    assert is_refused(answer)
    assert "no API key provided" in answer.json()["error"]["message"]


def test_openais_own_client(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=ALICE) as client:
        assert client.models.list().data
        assert client.chat.completions.create(model="idefics2-8b", messages=HELLO).choices  # type: ignore[call-overload]
    with openai.OpenAI(base_url=f"{url}/v1", api_key=WRONG) as client:
        for call in (
            client.models.list,
            lambda: client.chat.completions.create(model="idefics2-8b", messages=HELLO, stream=True),  # type: ignore[call-overload]
        ):
            with pytest.raises(openai.AuthenticationError) as caught:
                call()
            assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")
            assert caught.value.request_id


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_a_request_is_its_keys(http: httpx.Client, llm: ScriptedLLM, path: str) -> None:
    body = {"messages": HELLO} if path == CHAT else {"prompt": "Hi"} if path == "/v1/completions" else {"input": "Hi"}
    assert http.post(path, json=body, headers=bearer(ALICE)).status_code == 200
    (item,) = (*llm.chats, *llm.prompts)
    assert item.origin.key == "alice"


# -- spellings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", GUARDED)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE"])
def test_no_spelling_of_a_path_is_open(url: str, llm: ScriptedLLM, method: str, target: str) -> None:
    status, _ = ask(url, f"{method} {target}")
    assert status == 401
    assert llm.chats == []


@pytest.mark.parametrize("target", NO_PATHS)
def test_what_is_no_path_is_no_request(url: str, target: str) -> None:
    status, body = ask(url, f"GET {target}")
    assert status in (0, 400, 401, 404)
    assert b'"ok"' not in body


@pytest.mark.parametrize(
    "target", ["/health", "/health?x", "/health?/v1/models", "http://x/health", "/health#x", "/ping"]
)
def test_exactly_these_are_open_and_are_what_they_say(url: str, target: str) -> None:
    assert ask(url, f"GET {target}") == (200, b'{"status":"ok"}')


@pytest.mark.parametrize(
    "headers",
    [
        *(("X-Original-URL: /health",), ("X-Rewrite-URL: /health",), ("X-Forwarded-Prefix: /health",)),
        *(("X-Forwarded-For: 127.0.0.1",), ("X-HTTP-Method-Override: GET",), ("X-Forwarded-Path: /health",)),
        *(("Forwarded: for=127.0.0.1;host=/health",), ("Referer: http://x/health",), ("Authorization : Bearer x",)),
        *(("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Key: eA==", "Sec-WebSocket-Version: 13"),),
        (f"X-Authorization: Bearer {ALICE}",),
    ],
)
def test_headers_open_nothing(url: str, headers: tuple[str, ...]) -> None:
    assert ask(url, "GET /v1/models", *headers)[0] in (400, 401)


@pytest.mark.parametrize(
    "host", ["a/?x=", "a/health?", "a/health#", "x@/health", "/health", "127.0.0.1/health/", "[::1"]
)
def test_hosts_open_nothing(url: str, host: str) -> None:
    for target in ("/v1/models", "/metrics"):
        assert ask(url, f"GET {target}", host=f"Host: {host}")[0] in (400, 401)


def test_a_connection_that_has_asked_for_health_is_no_more_trusted_than_another(url: str) -> None:
    address = urlsplit(url)
    heads = [
        *("GET /health HTTP/1.1\r\nHost: x", f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ALICE}"),
        *("GET /v1/models HTTP/1.1\r\nHost: x", "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close"),
    ]
    with socket.create_connection((address.hostname, address.port), timeout=10) as made:
        made.sendall("".join(f"{head}\r\n\r\n" for head in heads).encode())
        data = b""
        while received := made.recv(65536):
            data += received
    assert [int(found) for found in re.findall(rb"HTTP/1\.1 (\d+)", data)] == [200, 200, 401, 200]


def test_other_protocols_are_refused(url: str) -> None:
    keys = load_keys(ServerConfig(api_key=[ALICE]))
    sent: list[Message] = []

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        raise AssertionError("has been let in")

    async def receive() -> Message:
        raise AssertionError("has been waited for")

    async def send(message: Message) -> None:
        sent.append(message)

    for kind in ("websocket", "webtransport"):
        headers = [(b"authorization", b"Bearer " + ALICE.encode())]
        scope = {"type": kind, "path": "/health", "raw_path": b"/health", "headers": headers}
        asyncio.run(AccessMiddleware(app, keys=keys)(scope, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


# -- bodies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", ["Content-Length: 1000000", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("authorization", [(), (f"Authorization: Bearer {WRONG}",)])
def test_a_refusal_waits_for_no_body(url: str, llm: ScriptedLLM, length: str, authorization: tuple[str, ...]) -> None:
    with begin(url + CHAT, length, "Expect: 100-continue", *authorization) as made:
        data = made.recv(65536)
        assert data.startswith(b"HTTP/1.1 401 "), data  # and no invitation to go on
        assert b"connection: close" in data
        if b"invalid_api_key" not in data:
            read_until(made, b"invalid_api_key")
    assert not llm.preparing.is_set()


def test_a_refusal_survives_a_body_that_goes_on(url: str) -> None:
    with begin(url + CHAT, "Content-Length: 8000000") as made:
        made.sendall(b"x" * 8_000_000)
        read_until(made, b"invalid_api_key")


# -- what is told ---------------------------------------------------------------------------------------------------


def access_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged of requests, but for how long they took."""
    lines = [record.getMessage() for record in caplog.records if record.name == "server.access"]
    return [re.sub(r" \d+ms", "", line) for line in lines]


def test_the_log_and_the_metrics_know_names_and_no_keys(
    http: httpx.Client, llm: ScriptedLLM, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "server")
    bodies = []

    def post(key: str, status: int) -> None:
        answer = http.post(f"{CHAT}?key={key}", json={"messages": HELLO, "user": key}, headers=bearer(key))
        bodies.append(answer.text)
        assert answer.status_code == status

    post(ALICE, 200)
    post(WRONG, 401)
    http.post(CHAT, json={"messages": []}, headers=bearer(ALICE))
    llm.script = (say("x"), RequestFailedError("broken"))
    post(ALICE, 500)
    llm.capacity_error = QuotaError("too many")
    post(ALICE, 429)
    http.get("/metrics")
    page = http.get("/metrics", headers=bearer(ALICE)).text
    wait_until(lambda: len(access_lines(caplog)) == 6)  # the last may be written behind its answer
    assert access_lines(caplog) == [
        f"POST {CHAT} 200 by alice",
        f"POST {CHAT} 401",
        f"POST {CHAT} 400 by alice",
        f"POST {CHAT} 500 by alice",
        f"POST {CHAT} 429 by alice",
        "GET /metrics 401",  # and of those that are let in only what goes wrong
    ]
    told = dict(
        re.findall(r'^idefics2:requests_by_key_total\{key="alice",outcome="(\w+)"\} (\S+)$', page, re.MULTILINE)
    )
    assert {"answered", "refused", "failed", "limited"} <= set(told)
    assert told["failed"] == told["limited"] == "1.0"
    assert 'handler="other",method="POST",status="401"' in page
    for text in (caplog.text, page, *bodies):
        assert "canary" not in text


def test_without_keys_no_authorization_is_looked_at_and_none_is_counted(without_keys: httpx.Client) -> None:
    for value in ("Bearer EMPTY", "Bearer", "Basic dXNlcjpwdw==", "fake-api-key"):
        assert without_keys.get("/v1/models", headers={"authorization": value}).status_code == 200
    assert "requests_by_key_total{" not in without_keys.get("/metrics").text
