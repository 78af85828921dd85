"""Conformance cases 47 to 55: streams on the wire, when they break, when nobody reads them, and when there are many."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.conformance.cards import scene_png
from tests.conformance.conftest import CONTEXT, FEW_QUEUED, FEW_SLOTS, SETTINGS, SLOTS
from tests.conformance.memory import resident_bytes
from tests.conformance.sabotage import CRASH_SEED, POISON, SECRET
from tests.conformance.talk import (
    CHAT,
    STREAM_SECONDS,
    Api,
    Json,
    Stream,
    check_error,
    check_stream,
    parse_events,
    picture,
    user,
)
from tests.serving import running_server

ENDLESS: Json = {"max_tokens": CONTEXT - 64, "ignore_eos": True, "temperature": 0}


def until(condition: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this should have come true long ago"
        time.sleep(0.01)


@contextlib.contextmanager
def open_stream(api: Api, conversation: str, **fields: Any) -> Iterator[Iterator[str]]:
    """Lines of a stream that has begun; leaving disconnects."""
    body = {**ENDLESS, **fields, "stream": True, "messages": [user(conversation)]}
    with httpx.stream("POST", f"{api.server.base_url}{CHAT}", json=body, timeout=60) as response:
        assert response.status_code == 200, response.read()
        lines = response.iter_lines()
        next(lines)
        yield lines


# --- shapes --------------------------------------------------------------------------------------------------------


def test_case_47_chunks_in_their_order(api: Api) -> None:
    plain = api.stream("Tell me", max_tokens=6, ignore_eos=True)
    assert all("usage" not in chunk for chunk in plain.chunks)
    assert all(chunk["choices"] for chunk in plain.chunks)
    first, *middle, last = plain.chunks
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in middle)
    assert last["choices"][0]["finish_reason"] == "length"
    assert set(first) == {"id", "object", "created", "model", "system_fingerprint", "choices"}
    assert re.fullmatch(r"chatcmpl-[A-Za-z0-9._-]+", first["id"])
    assert abs(first["created"] - time.time()) < 60
    counted = api.stream("Tell me", max_tokens=6, ignore_eos=True, stream_options={"include_usage": True})
    assert counted.usage["completion_tokens"] == 6
    assert all(chunk["usage"] is None for chunk in counted.chunks[:-1])
    assert counted.text() == plain.text()


def test_case_47_stream_options(api: Api) -> None:
    for options in ({}, None, {"include_usage": False}, {"include_obfuscation": True}):
        stream = api.stream("Hi", stream_options=options)
        assert all(chunk["choices"] for chunk in stream.chunks)
        assert "obfuscation" not in stream.raw.decode()
    for stream_flag in ({}, {"stream": False}, {"stream": None}):
        fields = {"stream_options": {"include_usage": True}, **stream_flag}
        api.refuses_chat("Hi", code="invalid_value", param="stream_options", **fields)
    nothing: list[Json | None] = [{}, None]
    for harmless in nothing:
        api.chat("Hi", stream_options=harmless)
    api.refuses_chat("Hi", code="invalid_type", param="stream_options", stream=True, stream_options=[])
    api.refuses_chat(
        "Hi",
        code="invalid_type",
        param="stream_options.include_usage",
        stream=True,
        stream_options={"include_usage": "yes"},
    )


@pytest.mark.parametrize("n", [1, 3])
def test_case_48_counts_on_every_chunk(api: Api, n: int) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    fields = {"max_tokens": 30, "ignore_eos": True, "n": n, "temperature": 1, "seed": 5}
    stream = api.stream("Tell me", stream_options=options, **fields)
    counts = [chunk["usage"]["completion_tokens"] for chunk in stream.chunks]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == stream.usage["completion_tokens"] == 30 * n
    assert len(set(counts)) > 10
    assert {chunk["usage"]["prompt_tokens"] for chunk in stream.chunks} == {stream.usage["prompt_tokens"]}
    for chunk in stream.chunks:
        usage = chunk["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    alone = api.stream("Tell me", stream_options={"continuous_usage_stats": True}, **fields)
    assert all("usage" not in chunk for chunk in alone.chunks)


BAD_STREAMS: list[tuple[Json, int, str, str]] = [
    ({"messages": []}, 400, "empty_array", "messages"),
    ({"temperature": 3}, 400, "decimal_above_max_value", "temperature"),
    ({"messages": [user("word " * 9000)]}, 400, "context_length_exceeded", "messages"),
    ({"messages": [user(picture(b""))]}, 400, "empty_image_file", "messages[0].content[0].image_url.url"),
    ({"messages": [user(picture(b"GIF89a"))]}, 400, "image_parse_error", "messages[0].content[0].image_url.url"),
    (
        {"messages": [user(picture("http://10.0.0.1/"))]},
        400,
        "invalid_image_url",
        "messages[0].content[0].image_url.url",
    ),
    ({"model": "other"}, 404, "model_not_found", "model"),
    ({"structured_outputs": {"regex": "("}}, 400, "invalid_value", "structured_outputs.regex"),
    ({"logit_bias": {"99999": 1}}, 400, "invalid_value", "logit_bias"),
]


@pytest.mark.parametrize(("fields", "status", "code", "param"), BAD_STREAMS, ids=[case[2] for case in BAD_STREAMS])
def test_case_49_a_bad_stream_is_a_status_and_not_an_event(
    api: Api, fields: Json, status: int, code: str, param: str
) -> None:
    body = {"messages": [user("Hi")], "stream": True, "max_tokens": 4, **fields}
    api.refuses(body, status=status, code=code, param=param)


# --- what breaks ---------------------------------------------------------------------------------------------------


def check_broken(stream: Stream) -> None:
    """Text, then one error event, then the end mark: no reason to have finished, no counts."""
    assert stream.done
    (error,) = stream.errors
    assert "error" in stream.events[-1]
    assert (error["type"], error["code"], error["param"]) == ("server_error", "internal_error", None)
    assert error["message"]
    assert SECRET.encode() not in stream.raw
    assert b"RuntimeError" not in stream.raw
    assert stream.reason() is None
    assert all(chunk["choices"] for chunk in stream.chunks)
    assert stream.text()


def test_case_50_a_step_that_fails_ends_its_streams_and_no_others(sabotaged: Api) -> None:
    """The engine cannot tell whose fault it was: what was in the step ends with an error, what waited goes on."""
    whole = sabotaged.chat("Waiting", max_tokens=20, ignore_eos=True).text
    with ThreadPoolExecutor(8) as pool:
        mates = [
            pool.submit(sabotaged.open, f"Mate {index}", **ENDLESS, stream_options={"include_usage": True})
            for index in range(3)
        ]
        until(lambda: sabotaged.metric("num_requests_running") == 3)
        broken = pool.submit(sabotaged.open, "Break", **ENDLESS, seed=CRASH_SEED)
        waiting = [pool.submit(sabotaged.open, "Waiting", max_tokens=20, ignore_eos=True) for _ in range(3)]
        check_broken(broken.result(30))
        for mate in mates:
            check_broken(mate.result(30))
        for other in waiting:
            check_stream(other.result(30))
            assert other.result().text() == whole
    sabotaged.server.wait_until_idle()
    assert sabotaged.metric("kv_cache_usage_perc") == 0
    assert sabotaged.chat("Waiting", max_tokens=20, ignore_eos=True).text == whole


def test_case_50_numbers_that_break_down_end_one_stream_alone(sabotaged: Api, vocabulary: dict[str, int]) -> None:
    """The second likeliest token's embedding is not a number; a frequency penalty brings it after many good ones."""
    breaking = {
        "logit_bias": {str(vocabulary["▁What"]): 100, str(POISON): 70},
        "frequency_penalty": 2,
        "max_tokens": 60,
        "ignore_eos": True,
    }
    mates = [f"Mate {index}" for index in range(3)]
    alone = [sabotaged.chat(mate, max_tokens=50, ignore_eos=True).text for mate in mates]
    with ThreadPoolExecutor(4) as pool:
        streams = [pool.submit(sabotaged.open, mate, max_tokens=50, ignore_eos=True) for mate in mates]
        broken = pool.submit(sabotaged.open, "Break", **breaking).result(30)
        for stream, wanted in zip(streams, alone, strict=True):
            check_stream(stream.result(30))
            assert stream.result().text() == wanted
    check_broken(broken)
    assert broken.text().startswith("What What What")
    error = check_error(
        sabotaged.post({"messages": [user("Break")], "temperature": 0, **breaking}),
        status=500,
        code="internal_error",
        param=None,
    )
    assert "nan" not in error["message"].lower()


def test_case_50_the_sdk_raises_what_the_event_says(sabotaged: Api) -> None:
    question: Any = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Break"}],
        "max_tokens": 50,
        "seed": CRASH_SEED,
        "extra_body": {"ignore_eos": True},
    }
    seen: list[Any] = []
    with openai.OpenAI(base_url=f"{sabotaged.server.base_url}/v1", api_key="EMPTY", max_retries=0) as client:
        stream = client.chat.completions.create(**question, stream=True)
        with pytest.raises(openai.APIError) as caught:
            seen.extend(stream)
        with pytest.raises(openai.InternalServerError) as raised:
            client.chat.completions.create(**question)
    assert (caught.value.type, caught.value.code) == ("server_error", "internal_error")
    assert caught.value.message
    assert seen
    assert all(choice.finish_reason is None for chunk in seen for choice in chunk.choices)
    assert raised.value.code == "internal_error"
    assert SECRET not in str(raised.value)


# --- those who leave -----------------------------------------------------------------------------------------------


def leave(api: Api, body: Json, *, after: float) -> None:
    """Send a request and hang up after some seconds, whatever has come by then."""
    deadline = time.monotonic() + after
    url, timeout = f"{api.server.base_url}{CHAT}", httpx.Timeout(20, read=after)
    with contextlib.suppress(httpx.TimeoutException), httpx.stream("POST", url, json=body, timeout=timeout) as response:
        for _ in response.iter_raw():  # comments too, each of which begins the timeout anew
            if time.monotonic() > deadline:
                return


def check_back_to_nothing(api: Api) -> None:
    api.server.wait_until_idle()
    assert api.metric("kv_cache_usage_perc") == 0


@pytest.mark.parametrize("stream", [True, False])
def test_case_51_leaving_in_the_middle_of_an_answer(sabotaged: Api, stream: bool) -> None:
    aborted = sabotaged.metric("requests_total", 'finish_reason="abort"')
    if stream:
        with open_stream(sabotaged, "Go on") as lines:
            for _ in range(20):
                next(lines)
            assert sabotaged.metric("num_requests_running") == 1
            assert sabotaged.metric("kv_cache_usage_perc") > 0
    else:
        leave(sabotaged, {**ENDLESS, "messages": [user("Go on")]}, after=0.3)
    check_back_to_nothing(sabotaged)
    assert sabotaged.metric("requests_total", 'finish_reason="abort"') == aborted + 1


@pytest.mark.parametrize("stream", [True, False])
def test_case_51_leaving_while_the_prompt_is_computed(sabotaged: Api, stream: bool) -> None:
    pictures = [picture(scene_png(seed, 400, 380), "high") for seed in range(8)]
    body = {**ENDLESS, "messages": [user(*pictures)], "stream": stream}
    for after in (0.02, 0.1, 0.4):
        leave(sabotaged, body, after=after)
    check_back_to_nothing(sabotaged)
    assert sabotaged.chat("Hi").texts == sabotaged.chat("Hi").texts


@pytest.mark.parametrize("stream", [True, False])
def test_case_51_leaving_the_queue(sabotaged: Api, stream: bool) -> None:
    with contextlib.ExitStack() as running:
        for index in range(FEW_SLOTS):
            running.enter_context(open_stream(sabotaged, f"Long {index}"))
        with ThreadPoolExecutor(1) as pool:
            queued = pool.submit(leave, sabotaged, {**ENDLESS, "messages": [user("More")], "stream": stream}, after=1)
            until(lambda: sabotaged.metric("num_requests_waiting") == 1)
            queued.result()
        until(lambda: sabotaged.metric("num_requests_waiting") == 0)
        assert sabotaged.metric("num_requests_running") == FEW_SLOTS
    check_back_to_nothing(sabotaged)


def test_case_52_a_reader_of_one_byte_a_second(api: Api) -> None:
    """5 MB of log-probabilities for nobody: the engine is done with them, others never notice, memory is bounded."""
    whole = api.chat("Slowly", max_tokens=400, ignore_eos=True).text
    others = api.chat("Others", max_tokens=20, ignore_eos=True).text
    fields = {"n": 8, "logprobs": True, "top_logprobs": 20, "max_tokens": 400, "ignore_eos": True, "temperature": 0}
    body = {"messages": [{"role": "user", "content": "Slowly"}], "stream": True, **fields}
    host, _, port = api.server.base_url.removeprefix("http://").partition(":")
    before = resident_bytes(api.server.process.pid)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(20)
        slow.connect((host, int(port)))
        slow.sendall(post_bytes(body))
        received = bytearray()
        for _ in range(3):
            received += slow.recv(1)
            started = time.monotonic()
            assert api.chat("Others", max_tokens=20, ignore_eos=True).text == others
            assert time.monotonic() - started < 5
            time.sleep(max(0.0, 1 - (time.monotonic() - started)))
        api.server.wait_until_idle(20)  # the answer is complete, though next to nothing of it has been read
        assert resident_bytes(api.server.process.pid) - before < 100 << 20
        while piece := slow.recv(1 << 20):
            received += piece
    stream = Stream(httpx.Headers())
    stream.raw = unchunked(bytes(received).partition(b"\r\n\r\n")[2])
    parse_events(stream)
    assert stream.done
    assert [stream.text(index) for index in range(8)] == [whole] * 8
    entries = [choice["logprobs"]["content"] for choice in stream.choices(0) if choice["logprobs"]]
    assert sum(len(content) for content in entries) == 400


def post_bytes(body: Json) -> bytes:
    """A request for an answer, after which the connection is to be closed."""
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def unchunked(body: bytes) -> bytes:
    """The content of a body in HTTP's chunks."""
    content = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        content += body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]
    return content


def test_case_53_comments_while_a_long_prompt_is_computed(sabotaged: Api) -> None:
    """Nothing but comments until the first token; then the stream goes on as if there had been none."""
    pictures = [picture(scene_png(seed, 600, 500), "high") for seed in range(100, 107)]
    stream = sabotaged.stream([user(*pictures, "What is it?")])
    silent, _, _ = stream.raw.partition(b"data: ")
    assert silent.count(b": keep-alive\n\n") >= 1
    assert silent.replace(b": keep-alive\n\n", b"") == b""
    with openai.OpenAI(base_url=f"{sabotaged.server.base_url}/v1", api_key="EMPTY", max_retries=0) as client:
        fresh = [picture(scene_png(seed, 600, 500), "high") for seed in range(120, 127)]
        messages: Any = [user(*fresh, "What is it?")]
        chunks = list(
            client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=8, stream=True)
        )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


# --- many ----------------------------------------------------------------------------------------------------------


async def bare_stream(api: Api, body: Json) -> Stream:
    """A stream without a client library, which would take longer than the server."""
    host, _, port = api.server.base_url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        async with asyncio.timeout(STREAM_SECONDS):
            writer.write(post_bytes(body))
            head, _, content = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    status, *lines = head.decode("latin-1").split("\r\n")
    assert status == "HTTP/1.1 200 OK", (head, content)
    headers = [line.partition(": ") for line in lines]
    stream = Stream(httpx.Headers([(name, value) for name, _, value in headers]))
    stream.raw = unchunked(content)
    parse_events(stream)
    return stream


def test_case_54_five_hundred_streams_at_once(api: Api) -> None:
    """More than run at once, and fewer than may wait: every one of them ends as it would alone."""
    bodies = [
        {"messages": [user(f"Stream {index % 20}")], "max_tokens": 2 + index % 3, "ignore_eos": True, "temperature": 0}
        for index in range(500)
    ]
    alone = {index: api.chat(f"Stream {index}", max_tokens=4, ignore_eos=True).text for index in range(20)}

    async def crowd() -> list[Stream]:
        return await asyncio.gather(*(bare_stream(api, {**body, "stream": True}) for body in bodies))

    for index, stream in enumerate(asyncio.run(crowd())):
        check_stream(stream)
        assert stream.reason() == "length"
        assert alone[index % 20].startswith(stream.text())
        assert len(stream.deltas) <= 2 + index % 3
    check_back_to_nothing(api)


def test_case_54_beyond_the_queue_there_is_a_429_that_clients_wait_out(sabotaged: Api) -> None:
    with contextlib.ExitStack() as full:
        for index in range(FEW_SLOTS):
            full.enter_context(open_stream(sabotaged, f"Long {index}"))
        with ThreadPoolExecutor(8) as pool:
            queued = [pool.submit(sabotaged.chat, f"Queued {index}", max_tokens=2) for index in range(FEW_QUEUED)]
            until(lambda: sabotaged.metric("num_requests_waiting") == FEW_QUEUED)
            for body in ({}, {"stream": True}):
                response = sabotaged.post({"messages": [user("One too many")], "max_tokens": 2, **body})
                check_error(response, status=429, code="queue_full", param=None)
                assert 1 <= int(response.headers["retry-after"]) <= 120
            assert sabotaged.get("/health").status_code == 200
            refused = sabotaged.metric("http_requests_total", 'status="429"')
            waiting = pool.submit(patient_ask, sabotaged)
            until(lambda: sabotaged.metric("http_requests_total", 'status="429"') > refused)
            full.close()
            assert waiting.result(60) == ["assistant"]
            for future in queued:
                assert future.result(30).reason in ("stop", "length")
    check_back_to_nothing(sabotaged)


def patient_ask(api: Api) -> list[str]:
    """OpenAI's client, which tries again by itself."""
    with openai.OpenAI(base_url=f"{api.server.base_url}/v1", api_key="EMPTY", max_retries=5) as client:
        answer = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Patience"}], max_tokens=2
        )
    return [choice.message.role for choice in answer.choices]


# --- the end -------------------------------------------------------------------------------------------------------


def test_case_55_sigterm(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """What runs may finish, what is new is sent away, what takes too long is told so, and the process ends well."""
    flags = (*SETTINGS, "--max-num-seqs", str(SLOTS), "--shutdown-timeout", "4")
    with running_server(tiny_checkpoint, tmp_path / "log", *flags) as server, ThreadPoolExecutor(4) as pool:
        api = Api(server)
        whole = api.chat("Short", max_tokens=60, ignore_eos=True).text
        too_long = [pool.submit(api.open, f"Long {index}", **ENDLESS) for index in range(2)]
        in_time = pool.submit(api.stream, "Short", max_tokens=60, ignore_eos=True)
        until(lambda: api.metric("num_requests_running") == 3)
        server.process.terminate()
        check_draining(api)
        assert in_time.result(30).text() == whole
        for future in too_long:
            check_cut(future)
        assert server.process.wait(30) == 0
        api.close()
    assert "Traceback" not in (tmp_path / "log").read_text()


def check_draining(api: Api) -> None:
    """By connections that are new, as a load balancer's and a client's are."""
    until(lambda: httpx.get(f"{api.server.base_url}/health").status_code == 503, 2)
    body = {"messages": [user("New")], "max_tokens": 2}
    response = httpx.post(f"{api.server.base_url}{CHAT}", json=body)
    check_error(response, status=503, code="server_shutting_down", param=None)
    assert 1 <= int(response.headers["retry-after"]) <= 120
    for path, status in (("/health", 503), ("/health/ready", 503), ("/health/live", 200), ("/metrics", 200)):
        assert httpx.get(f"{api.server.base_url}{path}").status_code == status


def check_cut(future: Future[Stream]) -> None:
    stream = future.result(30)
    assert stream.done
    (error,) = stream.errors
    assert (error["type"], error["code"]) == ("server_error", "server_shutting_down")
    assert stream.reason() is None
    assert stream.text()
