from __future__ import annotations

import json

import pytest

from server.chat import events
from server.chat.errors import ChatError
from server.chat.events import Answer, EventParser, error_message, without_surrogates


def parse(*chunks: bytes) -> list[str]:
    parser = EventParser()
    return [data for chunk in chunks for data in parser.feed(chunk)]


def take(answer: Answer, *payloads: object) -> str:
    """Feed events, one a second from second 11 on."""
    return "".join(answer.take(json.dumps(payload), 11.0 + second) for second, payload in enumerate(payloads))


def delta(content: object, reason: object = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": reason}]}


STREAM = "\ufeff: hello\n\nevent: x\nid: 1\ndata: häß😀\n\ndata:two\ndata: lines\n\nretry: 3\n\ndata\n\n".encode()


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_events_survive_any_cut_and_any_line_end(line_end: bytes, size: int) -> None:
    stream = STREAM.replace(b"\n", line_end)
    chunks = [stream[start : start + size] for start in range(0, len(stream), size)]
    assert parse(*chunks, b"") == ["häß😀", "two\nlines"]


def test_only_one_space_belongs_to_the_field() -> None:
    assert parse(b"data:  a \n\n") == [" a "]


def test_an_event_without_its_end_is_none() -> None:
    assert parse(b"data: a\n\ndata: b\n", b"data: c") == ["a"]


def test_bytes_that_are_not_utf8_are_replaced() -> None:
    assert parse(b"data: \xff\n\n") == ["�"]


def test_a_line_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_EVENT_BYTES", 10)
    with pytest.raises(ChatError, match="more than 10 bytes"):
        parse(b"data: ", b"x" * 10)


def test_a_whole_answer() -> None:
    answer = Answer(started=10.0)
    usage = {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 4}}
    told = take(answer, delta(""), delta("a"), delta("b", "length"), {"choices": [], "usage": usage})
    assert told == answer.text == "ab"
    assert (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens) == (7, 5, 4)
    assert answer.finish_reason == "length"
    assert answer.time_to_first_token == 1.0
    assert answer.tokens_per_second == 2.0  # 4 tokens in the 2 s after the first
    assert not answer.is_done
    answer.take("[DONE]", 20.0)
    assert answer.is_done


@pytest.mark.parametrize("end", [delta("", "stop"), None])
def test_either_end_makes_it_whole(end: object) -> None:
    answer = Answer(started=0.0)
    take(answer, delta("a"))
    assert not answer.is_whole
    answer.take(json.dumps(end) if end else " [DONE]", 1.0)
    assert answer.is_whole


def test_nothing_is_told_of_what_is_not_known() -> None:
    answer = Answer(started=10.0)
    assert answer.time_to_first_token is answer.tokens_per_second is None
    take(answer, delta("a", "stop"), {"usage": {"completion_tokens": 1}})
    assert answer.tokens_per_second is None


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"choices": None},
        {"choices": "x"},
        {"choices": ["x"]},
        {"choices": [{}]},
        {"choices": [{"delta": None}]},
        {"choices": [{"delta": "x"}]},
        delta(None),
        delta(7, 7),
        {"usage": 1},
        {"usage": {"prompt_tokens": "x", "prompt_tokens_details": 3}},
        {"error": None},
    ],
)
def test_odd_events_add_nothing(payload: object) -> None:
    answer = Answer(started=0.0)
    assert take(answer, payload) == answer.text == ""
    assert answer.finish_reason is None
    assert answer.prompt_tokens is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"error": {"message": "step\\nfailed", "code": 500}}', "the server ended the answer: step failed"),
        ("{]", "the server sent an event that is not JSON"),
        ("[1]", "the server sent an event that is not a JSON object"),
    ],
)
def test_what_is_no_answer_is_told(data: str, message: str) -> None:
    with pytest.raises(ChatError, match=message):
        Answer(started=0.0).take(data, 1.0)


def test_halves_of_characters_are_joined_or_replaced() -> None:
    assert without_surrogates("\ud83d\ude00 \ud83d a\udcff") == "😀 � a�"
    answer = Answer(started=0.0)
    assert answer.take('{"choices": [{"delta": {"content": "\\ud83d"}}]}', 1.0) == "�"


@pytest.mark.parametrize(
    "error",
    [{"error": {"message": "too\nlong"}}, {"message": "too long"}, {"detail": "too long"}, "too long"],
)
def test_the_message_is_found_in_every_shape(error: object) -> None:
    assert error_message(error) == "too long"


def test_a_long_message_is_cut() -> None:
    assert error_message("x" * 10_000) == "x" * events.MAX_MESSAGE
