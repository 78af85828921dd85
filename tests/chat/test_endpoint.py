from __future__ import annotations

import json
import time

import pytest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from server.chat import endpoint as module
from server.chat.endpoint import Endpoint
from server.chat.errors import ChatError
from server.chat.events import Answer
from tests.bench.canned import DONE, CannedServer, event, role, text, usage
from tests.bench.canned import Answer as Script
from tests.listening import listening, wait_until
from tests.serving import free_port

BODY = {"model": "canned", "messages": [{"role": "user", "content": "hä?"}]}


def ask(server: CannedServer, *, key: str | None = None, timeout: float = 30.0) -> Answer:
    answer = Answer(started=time.perf_counter())
    with Endpoint(server.url, api_key=key, timeout=timeout) as endpoint:
        assert "".join(endpoint.ask(BODY, answer)) == answer.text
    return answer


def serving(script: Script) -> CannedServer:
    return CannedServer(script=lambda _: script)


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_the_models_in_their_order_whatever_the_spelling_of_the_url(path: str) -> None:
    with CannedServer(models=["b", "a"]).running() as server, Endpoint(server.url + path) as endpoint:
        assert endpoint.models() == ["b", "a"]


def test_an_answer_with_its_counts() -> None:
    with serving([role(), text("hä"), text("ß", "length"), usage(50, 3, 2) + DONE]).running() as server:
        answer = ask(server, key="secret")
    assert answer.text == "häß"
    assert (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens) == (50, 3, 2)
    assert answer.finish_reason == "length"
    assert server.bodies == [{**BODY, "stream": True, "stream_options": {"include_usage": True}}]
    assert server.headers[0]["authorization"] == "Bearer secret"


def test_without_a_key_none_is_sent() -> None:
    with serving([text("a", "stop") + DONE]).running() as server:
        ask(server)
    assert "authorization" not in server.headers[0]


def test_characters_cut_between_chunks_are_whole() -> None:
    content = json.dumps({"choices": [{"delta": {"content": "ä😀"}, "finish_reason": "stop"}]}, ensure_ascii=False)
    stream = b"data: " + content.encode() + b"\n\n" + DONE
    pieces: list[bytes | float] = []
    for byte in stream:
        pieces += [bytes([byte]), 0.001]
    with serving(pieces).running() as server:
        assert ask(server).text == "ä😀"


def test_text_arrives_before_the_answer_ends() -> None:
    with (
        serving([text("first"), 60.0]).running() as server,
        Endpoint(server.url) as endpoint,
    ):
        pieces = endpoint.ask(BODY, Answer(started=0.0))
        assert next(pieces) == "first"
        assert server.in_flight == 1
        pieces.close()
        wait_until(lambda: server.in_flight == 0)  # the server is told that nobody wants the rest


def test_what_comes_behind_the_end_is_not_waited_for() -> None:
    with serving([text("a", "stop") + DONE + text("b"), 60.0]).running() as server:
        assert ask(server).text == "a"


@pytest.mark.parametrize("cut", [[], [RuntimeError("cut")]])
def test_an_answer_cut_off_is_told_and_what_came_is_there(cut: list[Exception]) -> None:
    answer = Answer(started=0.0)
    with (
        serving([role() + text("half"), *cut]).running() as server,
        Endpoint(server.url) as endpoint,
        pytest.raises(ChatError, match="the answer was cut off: the server closed the connection before its end"),
    ):
        list(endpoint.ask(BODY, answer))
    assert answer.text == "half"


def test_a_connection_that_breaks_behind_a_whole_answer_is_of_no_account() -> None:
    with serving([text("a", "stop"), 0.01, RuntimeError("cut")]).running() as server:
        assert ask(server).text == "a"


def test_an_error_event_is_told() -> None:
    script = [text("a"), event({"error": {"message": "step failed"}}) + DONE]
    with serving(script).running() as server, pytest.raises(ChatError, match="ended the answer: step failed"):
        ask(server)


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (JSONResponse({"error": {"message": "no such model"}}, 404), "HTTP 404: no such model"),
        (JSONResponse({"error": {"message": "who?"}}, 401), f"HTTP 401: who?\n{module._KEY_HINT}"),
        (
            JSONResponse({"error": {"message": "full"}}, 429, headers={"Retry-After": "7"}),
            "HTTP 429: full\nthe server asks to try again in 7 s (Retry-After)",
        ),
        (
            JSONResponse({"detail": "loading"}, 503, headers={"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}),
            "HTTP 503: loading\nthe server asks to try again at Wed, 21 Oct 2026 07:28:00 GMT (Retry-After)",
        ),
        (JSONResponse({"detail": "loading"}, 503), "HTTP 503: loading"),
        (PlainTextResponse("<html>\nbad\n</html>", 502), "HTTP 502: <html> bad </html>"),
        (Response(status_code=500), "HTTP 500: Internal Server Error"),
        (JSONResponse({}, 200), "the server answered application/json where a stream of events was asked for"),
    ],
)
def test_a_refusal_is_told_in_the_servers_words(response: Response, message: str) -> None:
    with serving(response).running() as server, pytest.raises(ChatError) as caught:
        ask(server)
    assert str(caught.value) == message


def test_an_error_without_end_is_cut() -> None:
    with (
        serving(PlainTextResponse("x " * module.MAX_ERROR_BYTES, 500)).running() as server,
        pytest.raises(ChatError) as caught,
    ):
        ask(server)
    assert len(str(caught.value)) < 1000


def test_a_silent_server_is_told() -> None:
    with serving([60.0]).running() as server, pytest.raises(ChatError, match="was silent for longer than --timeout"):
        ask(server, timeout=0.05)


def test_nobody_there_says_what_to_start() -> None:
    port = free_port()
    with Endpoint(f"http://127.0.0.1:{port}/v1") as endpoint, pytest.raises(ChatError) as caught:
        endpoint.models()
    assert str(caught.value) == (
        f"nothing listens at http://127.0.0.1:{port} (connection refused); start a server there: "
        f"idefics2-server serve --port {port}, or make serve PORT={port}"
    )


def test_a_name_that_is_not_there_is_told() -> None:
    with Endpoint("http://nowhere.invalid") as endpoint, pytest.raises(ChatError, match=r"^http://nowhere\.invalid: "):
        endpoint.models()


def test_a_server_without_models_or_without_their_list() -> None:
    with CannedServer(models=[]).running() as server:
        with Endpoint(server.url) as endpoint:
            assert endpoint.models() == []
        with Endpoint(f"{server.url}/nowhere") as endpoint, pytest.raises(ChatError, match="HTTP 404: Not Found"):
            endpoint.models()


def test_what_is_no_list_of_models_is_told() -> None:
    with (
        listening(PlainTextResponse("hello"), log_level="critical") as url,
        Endpoint(url) as endpoint,
        pytest.raises(ChatError, match="/v1/models is not a list of models"),
    ):
        endpoint.models()


def test_this_machine_is_not_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with CannedServer().running() as server, Endpoint(server.url) as endpoint:
        assert endpoint.models()
    with Endpoint("http://elsewhere.invalid") as endpoint, pytest.raises(ChatError, match="refused"):
        endpoint.models()
