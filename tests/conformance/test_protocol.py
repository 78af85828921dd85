"""Conformance cases 1 to 16: what is a request, what is refused, and how."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from tests.conformance.conftest import BODY_MIB, CONTEXT, KEY
from tests.conformance.talk import ALIAS, CHAT, MODEL, Api, Json, check_error, user

HI: Json = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}


@contextmanager
def raw_connection(api: Api) -> Iterator[socket.socket]:
    host, _, port = api.server.base_url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        yield connection


def read_head(connection: socket.socket) -> tuple[str, bytes]:
    """Status line and headers, lower-cased, and whatever of the body has come."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = connection.recv(65536)
        assert piece, f"the connection was closed after {data!r}"
        data += piece
    head, _, rest = data.partition(b"\r\n\r\n")
    return head.decode("latin-1").lower(), rest


def read_rest(connection: socket.socket, data: bytes) -> bytes:
    while piece := connection.recv(65536):
        data += piece
    return data


def words(count: int) -> str:
    return "word " * count


def test_case_01_minimal_request(api: Api) -> None:
    before = int(time.time())
    response = api.post({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5})
    answer = api.answer(response)
    body = answer.body
    assert body["id"].startswith("chatcmpl-")
    assert before <= body["created"] <= time.time()
    assert body["model"] == MODEL
    assert len(body["choices"]) == 1
    assert body["choices"][0]["logprobs"] is None
    assert "tool_calls" not in body["choices"][0]["message"]
    assert "service_tier" not in body
    assert 1 <= answer.completion_tokens <= 5
    assert answer.usage["total_tokens"] == answer.prompt_tokens + answer.completion_tokens
    assert answer.usage["prompt_tokens_details"]["image_tokens"] == 0
    assert response.headers["x-request-id"]
    assert response.headers["openai-version"] == "2020-10-01"
    assert int(response.headers["openai-processing-ms"]) >= 0


def test_case_01_service_tier_is_answered_only_when_asked(api: Api) -> None:
    assert api.chat("Hi", service_tier="flex").body["service_tier"] == "default"


def test_case_02_unknown_keys_are_ignored(api: Api) -> None:
    plain = api.chat([user("Hi ", "there")])
    message = {
        "role": "user",
        "weird": {"a": [1]},
        "name": "me",
        "content": [
            {"type": "text", "text": "Hi ", "cache_control": {"type": "ephemeral"}, "odd": None},
            {"type": "text", "text": "there", "prompt_cache_breakpoint": True},
        ],
    }
    ignored = {
        "num_ctx": 8,
        "keep_alive": "5m",
        "options": {"temperature": 2},
        "mirostat": 2,
        "extra_body": {"temperature": 2},
        "chat_template_kwargs": {"enable_thinking": True},
        "documents": [{"title": "t", "text": "x"}],
        "user": {"id": 3},
        "metadata": {"nested": {"deep": [1]}},
        "store": True,
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "prediction": {"type": "content", "content": "Hello"},
        "reasoning_effort": "minimal",
        "verbosity": "low",
        "parallel_tool_calls": False,
        "modalities": ["text"],
        "tool_choice": "none",
        "function_call": "auto",
        "vllm_xargs": {"a": 1},
        "session_id": "s",
        "repeat_penalty": 9,
        "nobody_knows_this": [[[]]],
    }
    assert api.chat([message], **ignored).texts == plain.texts


OPTIONAL = (
    *("model", "stream", "stream_options", "max_completion_tokens", "top_p", "n", "stop", "seed", "logit_bias"),
    *("frequency_penalty", "presence_penalty", "logprobs", "top_logprobs", "response_format", "tools", "tool_choice"),
    *("parallel_tool_calls", "functions", "function_call", "user", "safety_identifier", "prompt_cache_key", "metadata"),
    *("store", "service_tier", "modalities", "audio", "prediction", "reasoning_effort", "verbosity", "moderation"),
    *("web_search_options", "top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens", "min_new_tokens"),
    *("stop_token_ids", "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens"),
    *("bad_words", "allowed_token_ids", "logprob_token_ids", "prompt_logprobs", "guided_json", "guided_regex"),
    *("guided_choice", "guided_grammar", "guided_decoding_backend", "structured_outputs", "regex", "ebnf", "grammar"),
    *("echo", "add_generation_prompt", "continue_final_message", "add_special_tokens", "chat_template"),
    *("chat_template_kwargs", "documents", "priority", "request_id", "cache_salt", "mm_processor_kwargs"),
    *("media_io_kwargs", "truncate_prompt_tokens", "truncation_side", "return_token_ids", "best_of", "typical_p"),
    *("use_beam_search", "lora_path", "return_hidden_states", "watermark", "custom_logit_processor"),
)


def test_case_03_null_is_absent_for_every_optional_field(api: Api) -> None:
    plain = api.chat([user("Tell me")])
    nulls = dict.fromkeys(OPTIONAL)
    assert api.chat([user("Tell me")], **nulls).texts == plain.texts
    null_inside = {
        "stream_options": {"include_usage": None},
        "response_format": {"type": "text", "json_schema": None},
    }
    assert api.stream([user("Tell me")], **null_inside).text() == plain.text
    message = user("Tell me") | dict.fromkeys(("name", "tool_calls", "function_call", "refusal", "audio"))
    message["content"][0] |= {"detail": None, "uuid": None, "cache_control": None}
    assert api.chat([message]).texts == plain.texts


@pytest.mark.parametrize("name", ["temperature", "max_tokens"])
def test_case_03_null_of_what_other_cases_always_give(api: Api, name: str) -> None:
    forced_end = {"logit_bias": {"2": 100}, "seed": 5}
    body = {key: value for key, value in (HI | forced_end).items() if key != name}
    assert api.answer(api.post(body | {name: None})).texts == api.answer(api.post(body)).texts


BROKEN_BODIES = {
    "an opening brace": b"{",
    "an array": b"[]",
    "a string": b'"x"',
    "null": b"null",
    "nothing": b"",
    "spaces": b"  \n ",
    "invalid UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "UTF-16": json.dumps(HI).encode("utf-16"),
    "NaN": json.dumps(HI | {"temperature": float("nan")}).encode(),
    "Infinity": json.dumps(HI | {"top_p": float("inf")}).encode(),
    "-Infinity": json.dumps(HI | {"min_p": float("-inf")}).encode(),
    "two objects": json.dumps(HI).encode() * 2,
    "a trailing comma": json.dumps(HI).encode()[:-1] + b",}",
    "single quotes": b"{'messages': []}",
    "a lone surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "a control character": b'{"messages": [{"role": "user", "content": "\x01"}]}',
    "100,000 brackets": b'{"messages": ' + b"[" * 100_000,
}


@pytest.mark.parametrize("body", BROKEN_BODIES.values(), ids=BROKEN_BODIES)
def test_case_04_a_body_that_is_not_a_json_object(api: Api, body: bytes) -> None:
    error = api.refuses(body, code="invalid_json", param=None)
    assert "surrogates" not in error["message"]  # nor any other word of a client's or of Python's


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/xml", ""],
)
def test_case_05_another_content_type_is_refused(api: Api, kind: str) -> None:
    api.refuses(
        json.dumps(HI).encode(),
        status=415,
        code="unsupported_media_type",
        param=None,
        headers={"content-type": kind},
    )


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/json;charset=UTF-8"]
)
def test_case_05_json_is_accepted_however_it_is_spelled(api: Api, kind: str) -> None:
    api.answer(api.post(HI, headers={"content-type": kind}))


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, "missing_required_parameter"),
        ({"messages": None}, "missing_required_parameter"),
        ({"messages": []}, "empty_array"),
        ({"messages": {}}, "invalid_type"),
        ({"messages": "Hi"}, "invalid_type"),
        ({"messages": 3}, "invalid_type"),
        ({"messages": True}, "invalid_type"),
    ],
)
def test_case_06_messages_that_are_no_list(api: Api, fields: Json, code: str) -> None:
    api.refuses({"max_tokens": 4, **fields}, code=code, param="messages")


@pytest.mark.parametrize(
    ("literal", "code"),
    [
        ('"0.5"', "invalid_type"),
        ("true", "invalid_type"),
        ("[1]", "invalid_type"),
        ("-0.1", "decimal_below_min_value"),
        ("2.1", "decimal_above_max_value"),
        ("1e308", "decimal_above_max_value"),
        ("1e400", "invalid_type"),
    ],
)
def test_case_07_temperatures_out_of_range(api: Api, literal: str, code: str) -> None:
    body = json.dumps(HI | {"temperature": "here"}).replace('"here"', literal)
    api.refuses(body.encode(), code=code, param="temperature")


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-9, 0.5, 1, 2, 2.0])
def test_case_07_temperatures_within_range(api: Api, temperature: float) -> None:
    answer = api.chat("Hi", temperature=temperature)
    if temperature == 1e-9:
        assert answer.texts == api.chat("Hi", temperature=0).texts


@pytest.mark.parametrize(
    ("param", "value", "code"),
    [
        ("top_p", -0.1, "decimal_below_min_value"),
        ("top_p", 1.1, "decimal_above_max_value"),
        ("top_p", "1", "invalid_type"),
        ("top_k", -2, "integer_below_min_value"),
        ("top_k", 1.5, "invalid_type"),
        ("top_k", True, "invalid_type"),
        ("min_p", 1.5, "decimal_above_max_value"),
        ("min_p", -0.5, "decimal_below_min_value"),
        ("repetition_penalty", 0, "decimal_below_min_value"),
        ("repetition_penalty", -1, "decimal_below_min_value"),
        ("presence_penalty", 2.1, "decimal_above_max_value"),
        ("presence_penalty", -2.1, "decimal_below_min_value"),
        ("frequency_penalty", 2.1, "decimal_above_max_value"),
        ("frequency_penalty", -2.1, "decimal_below_min_value"),
        ("seed", 1.5, "invalid_type"),
        ("seed", 2**63, "integer_above_max_value"),
    ],
)
def test_case_08_sampling_parameters_out_of_range(api: Api, param: str, value: Any, code: str) -> None:
    api.refuses_chat("Hi", **{param: value}, code=code, param=param)


def test_case_08_values_that_switch_a_rule_off(api: Api) -> None:
    plain = api.chat("Hi", temperature=1, seed=3).texts
    for off in ({"top_k": -1}, {"top_k": 0}, {"min_p": 0}, {"top_p": 1}, {"repetition_penalty": 1}):
        assert api.chat("Hi", temperature=1, seed=3, **off).texts == plain
    greedy = api.chat("Hi").texts
    for only_best in ({"top_k": 1}, {"top_p": 0}, {"min_p": 1}):
        assert api.chat("Hi", temperature=1, seed=3, **only_best).texts == greedy


def test_case_09_model_names(api: Api) -> None:
    api.refuses(HI | {"model": "gpt-4o"}, status=404, code="model_not_found", param="model")
    api.refuses(HI | {"model": 3}, code="invalid_type", param="model")
    assert api.answer(api.post(HI)).body["model"] == MODEL
    assert api.answer(api.post(HI | {"model": ""})).body["model"] == MODEL
    assert api.answer(api.post(HI | {"model": ALIAS})).body["model"] == ALIAS
    assert api.stream("Hi", model=ALIAS).chunks[0]["model"] == ALIAS


def test_case_10_models_by_id(api: Api, client: openai.OpenAI) -> None:
    listed = api.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == [MODEL, ALIAS]
    for card in listed["data"]:
        assert (card["object"], card["max_model_len"]) == ("model", CONTEXT)
        assert isinstance(card["created"], int)
        assert card["owned_by"]
        assert card["root"]
    for path in ("/v1/models/org%2Ftiny", "/v1/models/org/tiny"):
        response = api.get(path)
        assert (response.status_code, response.json()["id"]) == (200, ALIAS)
    assert client.models.retrieve(ALIAS).id == ALIAS
    for path in ("/v1/models/other", "/v1/models/org%2Fother", "/v1/models/org/tiny/more"):
        check_error(api.get(path), status=404, code="model_not_found", param="model")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/", 405, "method_not_allowed"),
        ("GET", "/v1", 404, "not_found"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("POST", "/v1/audio/speech", 404, "not_found"),
        ("POST", "/v1/moderations", 404, "not_found"),
        ("GET", "/../../etc/passwd", 404, "not_found"),
        ("GET", "/v1/chat/completions/", 404, "not_found"),
        ("GET", "/v1/chat/completions/chatcmpl-1", 404, "not_found"),
        ("GET", "/%00%ff", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", CHAT, 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("PATCH", "/health", 405, "method_not_allowed"),
        ("PROPFIND", CHAT, 405, "method_not_allowed"),
    ],
)
def test_case_11_unknown_paths_and_methods(api: Api, method: str, path: str, status: int, code: str) -> None:
    response = api.send(method, path)
    check_error(response, status=status, code=code, param=None)
    assert "detail" not in response.json()
    if status == 405:
        assert response.headers["allow"]


def test_case_12_a_key_is_asked_for_where_one_is_configured(guarded: Api) -> None:
    wrong = (f"Bearer {KEY}x", f"Basic {KEY}", "Basic dXNlcjpwdw==", "Bearer", "", KEY)
    for headers in ({}, *({"authorization": value} for value in wrong)):
        response = guarded.post(HI, headers=headers)
        check_error(response, status=401, code="invalid_api_key", param=None)
        assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/v1/models", "/metrics", "/nothing"):
            check_error(guarded.get(path, headers=headers), status=401, code="invalid_api_key", param=None)
        assert guarded.get("/health", headers=headers).status_code == 200
        for path in (CHAT, "/health", "/v1/models"):
            check_error(guarded.send("OPTIONS", path), status=405, code="method_not_allowed", param=None)
    right = {"authorization": f"Bearer {KEY}"}
    guarded.answer(guarded.post(HI, headers=right))
    assert guarded.get("/v1/models", headers=right).status_code == 200


def test_case_12_without_a_key_configured_every_authorization_is_ignored(api: Api) -> None:
    """Clients that must send something send what they like."""
    for value in ("Bearer EMPTY", "Bearer", "Basic dXNlcjpwdw==", "fake-api-key", "Bearer a b c"):
        api.answer(api.post(HI, headers={"authorization": value}))
        assert api.get("/health", headers={"authorization": value}).status_code == 200
    for path in (CHAT, "/health", "/v1/models"):
        check_error(api.send("OPTIONS", path), status=405, code="method_not_allowed", param=None)


def test_case_13_request_ids_are_echoed(api: Api) -> None:
    for given in ("a", "req-1.2_3", "A" * 128):
        assert api.post(HI, headers={"x-request-id": given}).headers["x-request-id"] == given
        assert api.post(b"{", headers={"x-request-id": given}).headers["x-request-id"] == given
    bad: list[Any] = ["A" * 129, "A" * 10_000, "a b", "a/b", "a;b", "", "é".encode("latin-1"), b"a\tb"]
    for refused in bad:
        got = api.post(HI, headers={"x-request-id": refused}).headers["x-request-id"]
        assert got.startswith("req_")


def test_case_13_request_id_with_a_newline_injects_nothing(api: Api) -> None:
    body = json.dumps(HI).encode()
    for id_bytes in (b"a\nInjected: yes", b"a\r Injected: yes", b"a\r\n Injected: yes", b"a\x00b"):
        with raw_connection(api) as connection:
            connection.sendall(
                b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
                b"X-Request-Id: %b\r\nContent-Length: %d\r\n\r\n%b" % (CHAT.encode(), id_bytes, len(body), body)
            )
            head, _ = read_head(connection)
        assert head.split()[1] in ("200", "400"), head
        assert "\ninjected" not in head
        assert "x-request-id: a" not in head
    api.answer(api.post(HI))


def test_case_13_one_request_id_in_flight_many_times(api: Api, vocabulary: dict[str, int]) -> None:
    names = ["▁What", "▁one", "▁two", "▁red", "▁blue", "▁time", "▁year", "▁life"]

    def ask(name: str) -> tuple[str, str, str]:
        fields = {"logit_bias": {str(vocabulary[name]): 100}, "max_tokens": 30}
        response = api.post(HI | fields, headers={"x-request-id": "same"})
        answer = api.answer(response)
        return response.headers["x-request-id"], answer.text, answer.body["id"]

    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(ask, names))
    assert {request_id for request_id, _, _ in answers} == {"same"}
    assert [content for _, content, _ in answers] == [" ".join([name[1:]] * 30) for name in names]
    assert len({answer_id for _, _, answer_id in answers}) == len(names)


def test_case_13_request_ids_in_bodies(api: Api) -> None:
    """What a client calls its request is part of the answer's id, if it is a good name."""
    assert api.answer(api.post(HI | {"request_id": "req-1.2_3"})).body["id"] == "chatcmpl-req-1.2_3"
    for bad in ("a b", "a\nb", "x" * 129, "", "\x00"):
        assert re.fullmatch("chatcmpl-[0-9a-f]{32}", api.answer(api.post(HI | {"request_id": bad})).body["id"])
    with ThreadPoolExecutor(4) as pool:
        twins = list(pool.map(lambda _: api.chat("Tell me", request_id="twin", max_tokens=30), range(4)))
    assert {twin.text for twin in twins} == {api.chat("Tell me", max_tokens=30).text}


def test_case_14_a_body_too_large_by_its_content_length(api: Api) -> None:
    with raw_connection(api) as connection:
        started = time.monotonic()
        connection.sendall(
            b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n{"
            % (CHAT.encode(), (BODY_MIB << 20) + 1)
        )
        head, rest = read_head(connection)
        assert time.monotonic() - started < 2  # before the body, which never comes
        assert head.startswith("http/1.1 413")
        assert "connection: close" in head
        connection.shutdown(socket.SHUT_WR)
        assert b'"code":"request_too_large"' in read_rest(connection, rest)
    api.answer(api.post(HI))


def test_case_14_a_body_too_large_in_chunks(api: Api) -> None:
    sent = 0

    def body() -> Iterator[bytes]:
        nonlocal sent
        yield b'{"messages": [{"role": "user", "content": "'
        for _ in range(4 * BODY_MIB):
            sent += 1 << 19
            yield b"x" * (1 << 19)

    response = api.send("POST", CHAT, content=body(), headers={"content-type": "application/json"})
    check_error(response, status=413, code="request_too_large", param=None)
    assert sent > BODY_MIB << 20  # it was not refused by its length, which nobody told
    api.answer(api.post(HI))


def test_case_14_a_body_of_exactly_the_limit_is_read(api: Api) -> None:
    body = json.dumps(HI).encode().ljust(BODY_MIB << 20)
    api.answer(api.post(body))
    api.refuses(body + b" ", status=413, code="request_too_large", param=None)


LONG = {
    "2,000 messages": [{"role": "user" if i % 2 else "assistant", "content": "a few words"} for i in range(2000)],
    "5 MB of words": [{"role": "user", "content": words(1_000_000)}],
    "5 MB of one letter": [{"role": "user", "content": "a" * 5_000_000}],
    "5 MB of spaces": [{"role": "user", "content": " " * 5_000_000}],
    "5 MB of emoji": [{"role": "user", "content": "😀" * 1_250_000}],
    "500 parts": [user(*["word " * 100] * 500)],
}


@pytest.mark.parametrize("messages", LONG.values(), ids=LONG)
def test_case_15_a_prompt_far_too_long_is_refused_at_once(api: Api, messages: list[Json]) -> None:
    body = json.dumps({"messages": messages, "max_tokens": 4}, ensure_ascii=False).encode()
    waits: list[float] = []
    watching, done = threading.Event(), threading.Event()

    def watch() -> None:
        with httpx.Client(base_url=api.server.base_url, trust_env=False) as http:
            while not done.is_set():
                started = time.monotonic()
                assert http.get("/health").status_code == 200
                waits.append(time.monotonic() - started)
                watching.set()
                time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert watching.wait(10)
    started = time.monotonic()
    try:
        error = api.refuses(body, code="context_length_exceeded", param="messages")
    finally:
        done.set()
        watcher.join()
    assert str(CONTEXT) in error["message"]
    assert time.monotonic() - started < 5
    assert max(waits) < 1


def test_case_16_the_last_token_of_the_context(api: Api) -> None:
    ends_at_once = {"max_tokens": 1, "ignore_eos": True}
    one = api.chat(words(1), **ends_at_once).prompt_tokens
    assert api.chat(words(101), **ends_at_once).prompt_tokens == one + 100  # a word is a token
    fits = CONTEXT - 1 - one + 1
    for fields in (ends_at_once, {"max_tokens": None, "ignore_eos": True}, {"max_tokens": 100}):
        answer = api.chat(words(fits), **fields)
        assert (answer.prompt_tokens, answer.completion_tokens) == (CONTEXT - 1, 1)
        assert answer.reason == "length"
    for count in (fits + 1, fits + 2):
        error = api.refuses_chat(words(count), code="context_length_exceeded", param="messages")
        assert str(CONTEXT) in error["message"]
        assert str(CONTEXT - 1 - fits + count) in error["message"]
