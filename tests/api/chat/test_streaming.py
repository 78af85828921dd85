"""The shape of a stream, to the byte, and what a broken one ends with."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

import pytest

from server.api.chat.chunks import ChunkEncoder
from server.api.protocol import CompletionUsage, StreamOptions
from server.errors import EngineDeadError, RequestFailedError
from server.types import FinishReason, RequestOutput, Usage
from tests.api import wire
from tests.api.chat.client import post
from tests.api.scripted_llm import TWO_CATS, ScriptedLLM, say, serving, written

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 5, "model": "m", "system_fingerprint": "fp"}
START = 'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":5,"model":"m","system_fingerprint":"fp",'
ROLE = '"choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'


def content(text: str, finish: str = "null") -> str:
    return f'"choices":[{{"index":0,"delta":{{"content":"{text}"}},"logprobs":null,"finish_reason":{finish}}}]'


def usage(completion_tokens: int) -> str:
    return f'"usage":{wire.compact(wire.usage(85, completion_tokens, cached_tokens=16, image_tokens=64))}'


def chunks(*bodies: str) -> str:
    return "".join(f"{START}{body}}}\n\n" for body in bodies)


def stream(script: Sequence[RequestOutput | Exception], **options: bool) -> list[bytes]:
    return written(script, ChunkEncoder(HEAD, StreamOptions(**options)))


def text_of(events: list[bytes]) -> str:
    return b"".join(events).decode()


def test_plain() -> None:
    finish = '"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]'
    expected = chunks(ROLE, content("Two"), content(" cats."), finish) + "data: [DONE]\n\n"
    assert text_of(stream(TWO_CATS)) == expected


def test_finish_rides_on_the_last_content() -> None:
    script = (say("Two"), say(" cats.", FinishReason.LENGTH))
    expected = chunks(ROLE, content("Two"), content(" cats.", '"length"')) + "data: [DONE]\n\n"
    assert text_of(stream(script)) == expected


def test_one_output_only() -> None:
    assert (
        text_of(stream([say("No.", FinishReason.STOP)])) == chunks(ROLE, content("No.", '"stop"')) + "data: [DONE]\n\n"
    )


def test_a_stop_at_the_first_token() -> None:
    finish = '"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":"\\n"}]'
    script = [say("", FinishReason.STOP, stop_reason="\n")]
    assert text_of(stream(script)) == chunks(ROLE, finish) + "data: [DONE]\n\n"


def test_include_usage() -> None:
    null = ',"usage":null'
    finish = '"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]'
    expected = chunks(
        ROLE + null, content("Two") + null, content(" cats.") + null, finish + null, '"choices":[],' + usage(3)
    )
    assert text_of(stream(TWO_CATS, include_usage=True)) == expected + "data: [DONE]\n\n"


def test_continuous_usage() -> None:
    script = (say("Two"), say(" cats.", FinishReason.STOP))
    expected = chunks(
        f"{ROLE},{usage(0)}",
        f"{content('Two')},{usage(1)}",
        f"{content(' cats.', chr(34) + 'stop' + chr(34))},{usage(2)}",
        f'"choices":[],{usage(2)}',
    )
    events = stream(script, include_usage=True, continuous_usage_stats=True)
    assert text_of(events) == expected + "data: [DONE]\n\n"


def test_continuous_usage_alone_is_nothing() -> None:
    assert stream(TWO_CATS, continuous_usage_stats=True) == stream(TWO_CATS)


def test_usage_is_what_the_plain_answer_says() -> None:
    given = Usage(prompt_tokens=85, completion_tokens=3, cached_tokens=16, image_tokens=64)
    assert "{" + usage(3) + "}" == json.dumps(
        {"usage": CompletionUsage.from_usage(given).model_dump()}, separators=(",", ":")
    )


def test_outputs_without_text_make_no_chunk() -> None:
    script = (say("a"), say(""), say(""), say("b", FinishReason.STOP))
    assert text_of(stream(script)) == chunks(ROLE, content("a"), content("b", '"stop"')) + "data: [DONE]\n\n"


@pytest.mark.parametrize(
    "text", ['"quotes" \\ and\nbreaks\r\t\0', "a\u2028b\u2029c\x85d", "größe 猫 🐈 e\u0301", "\x1c\x0b\x7f"]
)
def test_any_text_stays_in_one_line(text: str) -> None:
    events = text_of(stream([say(text, FinishReason.STOP)]))
    # splitlines knows more ends of lines than any client does.
    lines = [line for line in events.splitlines() if line]
    assert len(lines) == 3
    assert json.loads(lines[1].removeprefix("data: "))["choices"][0]["delta"]["content"] == text
    if text.startswith("größe"):
        assert "größe 猫 🐈" in events  # as UTF-8, not as six times the bytes


def test_an_error_in_the_middle() -> None:
    error = RequestFailedError("the step failed for this request")
    expected = chunks(ROLE, content("Two")) + (
        'data: {"error":{"message":"the step failed for this request","type":"server_error","param":null,'
        '"code":"internal_error"}}\n\ndata: [DONE]\n\n'
    )
    assert text_of(stream([say("Two"), error], include_usage=False)) == expected


def test_no_usage_after_an_error() -> None:
    events = text_of(stream([say("Two"), EngineDeadError("gone")], include_usage=True))
    assert '"code":"engine_unavailable"' in events
    assert "prompt_tokens" not in events
    assert '"finish_reason":"' not in events
    assert events.endswith("data: [DONE]\n\n")


def test_an_unexpected_error_tells_the_client_nothing(caplog: pytest.LogCaptureFixture) -> None:
    events = text_of(stream([say("Two"), ValueError("/etc/secret at 0x7f00")]))
    assert "secret" not in events
    assert '"code":"internal_error"' in events
    assert "/etc/secret" in caplog.text  # but the operator all


@pytest.mark.parametrize(
    "script", [[say("Two")], [say("Two", FinishReason.ABORT)], [say("x"), say("", FinishReason.ERROR)]]
)
def test_reasons_that_no_client_may_see(script: list[RequestOutput]) -> None:
    events = text_of(stream(script))
    assert '"error":{' in events
    assert "abort" not in events
    assert '"finish_reason":"' not in events


def test_one_write_for_one_output() -> None:
    """The opening rides on the first text and the end on the last: a stream of n outputs is n writes."""
    assert len(stream((say("a"), say("b"), say("c", FinishReason.STOP)), include_usage=True)) == 3


# -- over a socket ---------------------------------------------------------------------------------------------------


def test_headers_and_framing() -> None:
    with serving(ScriptedLLM()) as url:
        answer = post(
            url,
            stream=True,
            stream_options={"include_usage": True},
            model="HuggingFaceM4/idefics2-8b",
            service_tier="auto",
        )
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-request-id"].startswith("req_")
    assert "content-encoding" not in answer.headers
    assert "\r" not in answer.text
    parsed = [json.loads(event) for event in wire.data_events(answer.text)]
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in parsed}) == 1
    assert parsed[0]["id"].startswith("chatcmpl-")
    assert {(chunk["model"], chunk["service_tier"]) for chunk in parsed} == {("HuggingFaceM4/idefics2-8b", "default")}
    assert list(parsed[0]) == [
        *("id", "object", "created", "model", "system_fingerprint", "service_tier", "choices", "usage")
    ]
    assert parsed[-1]["choices"] == []
    assert parsed[-1]["usage"]["total_tokens"] == 88


def test_silence_is_filled_with_comments() -> None:
    script = (say("Two"), 0.35, say(" cats.", FinishReason.STOP))
    with serving(ScriptedLLM(script), keep_alive_seconds=0.1) as url:
        text = post(url, stream=True).text
    assert 2 <= text.count(": keep-alive\n\n") <= 4
    assert all(event.startswith(("data: ", ": keep-alive")) for event in text.removesuffix("\n\n").split("\n\n"))


@pytest.mark.parametrize("where", ["prepare_script", "script"])
def test_an_error_before_the_first_token_is_an_http_status(where: str) -> None:
    llm = ScriptedLLM(**{where: [0.01, RequestFailedError("the step failed")]})
    with serving(llm) as url:
        answer = post(url, stream=True)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the step failed"
    assert answer.headers["content-type"] == "application/json"


def test_no_event_reaches_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """The library logs what it sends, at DEBUG; `configure_logging` must have an eye on that."""
    from server.observability.logs import configure_logging

    root = logging.getLogger()
    before = (root.handlers[:], root.level)
    try:
        configure_logging("DEBUG")
        root.addHandler(caplog.handler)
        with serving(ScriptedLLM((say("sEcReT"), say("!", FinishReason.STOP)))) as url:
            assert "sEcReT" in post(url, stream=True, messages=[{"role": "user", "content": "pRoMpT"}]).text
    finally:
        root.handlers[:], root.level = before
    assert "POST /v1/chat/completions 200" in caplog.text
    assert "sEcReT" not in caplog.text
    assert "pRoMpT" not in caplog.text
