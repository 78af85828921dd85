from __future__ import annotations

import pytest

from server.bench.stream import RequestRecord, StreamReader, error_message
from tests.bench.canned import DONE, event, role, text, usage


def read(*pieces: tuple[bytes, float]) -> RequestRecord:
    """A record of a request sent at 10 s whose stream arrived in these pieces."""
    record = RequestRecord(index=0, due=10.0, start=10.0)
    reader = StreamReader(record)
    for data, now in pieces:
        reader.feed(data, now)
    reader.close()
    return record


def test_times_and_counts_of_a_whole_answer() -> None:
    record = read(
        (role(), 10.5),
        (text("a"), 11.0),
        (text("b"), 11.25),
        (text("c", "length"), 12.0),
        (usage(7, 4, 3), 12.5),
        (DONE, 13.0),
    )
    assert record.error is None
    assert record.finish_reason == "length"
    assert record.time_to_first_token == 0.5  # the opening event counts, empty as it is
    assert record.time_to_first_text == 1.0
    assert record.time_per_token == 0.5  # 1.5 s for the 3 tokens after the first
    assert list(record.gaps()) == [0.25, 0.75]
    assert record.latency == 2.0  # to the last token, not to the usage after it
    assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (7, 4, 3)


def test_an_event_without_text_is_no_gap_but_may_be_the_last_token() -> None:
    record = read((text("a"), 11.0), (text(""), 12.0), (text("b"), 13.0), (text("", "stop"), 14.0), (DONE, 14.0))
    assert list(record.gaps()) == [2.0]
    assert record.latency == 4.0


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_framing_survives_any_cut(size: int, line_end: bytes) -> None:
    stream = b": keep-alive\n\nid: 4\n" + role() + text("a\n\nb\u2028") + text("c", "stop") + usage(1, 2) + DONE
    stream = stream.replace(b"\n", line_end)
    record = read(*((stream[start : start + size], 11.0) for start in range(0, len(stream), size)))
    assert record.error is None
    assert len(record.text_times) == 2
    assert record.completion_tokens == 2


def test_data_needs_no_space_after_the_colon() -> None:
    assert read((text("a", "stop").replace(b"data: ", b"data:") + b"data:[DONE]\n\n", 11.0)).error is None


def test_without_usage_events_with_text_are_counted() -> None:
    record = read((role() + text("a") + text("b", "stop") + DONE, 11.0))
    assert record.completion_tokens == 2
    assert not record.usage_reported


def test_the_last_usage_counts() -> None:
    assert read((usage(5, 1) + text("a", "stop") + usage(5, 9) + DONE, 11.0)).completion_tokens == 9


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (text("a") + DONE, "stream ended without a finish_reason"),
        (text("a", "stop"), "stream ended without [DONE]"),
        (b"", "stream ended without a finish_reason"),
        (text("a") + event({"error": {"message": "step failed", "code": 500}}) + DONE, "error event: step failed"),
        (text("a", "stop") + event({"error": "broken"}) + DONE, "error event: broken"),
        (b"data: {]\n\n" + text("a", "stop") + DONE, "malformed event"),
        (b'data: {"choices": "a"}\n\n' + text("a", "stop") + DONE, "malformed event"),
        (b"data: \xff\n\n" + text("a", "stop") + DONE, "malformed event"),
    ],
)
def test_what_is_not_a_whole_answer_failed(stream: bytes, message: str) -> None:
    record = read((stream, 11.0))
    assert record.error is not None
    assert record.error.startswith(message)


def test_usage_after_a_reason_to_finish_ends_an_answer_too() -> None:
    assert read((text("a", "stop") + usage(5, 1), 11.0)).error is None
    assert read((text("a") + usage(5, 1), 11.0)).error == "stream ended without a finish_reason"


def test_a_null_error_is_none() -> None:
    assert read((event({"error": None, "choices": []}) + text("a", "stop") + DONE, 11.0)).error is None


def test_measures_of_an_answer_of_one_token_or_none() -> None:
    one = read((text("a", "length") + usage(3, 1) + DONE, 11.0))
    assert one.error is None
    assert one.time_per_token is None
    assert list(one.gaps()) == []
    nothing = read((DONE, 11.0))
    assert nothing.time_to_first_token is nothing.latency is nothing.time_to_first_text is None


@pytest.mark.parametrize(
    "error",
    [
        {"error": {"message": "too\nlong"}},
        {"message": "too long"},
        {"detail": "too long"},
        {"error": "too long"},
        "too long",
    ],
)
def test_the_message_is_found_in_every_shape(error: object) -> None:
    assert error_message(error) == "too long"


def test_a_long_message_is_cut() -> None:
    assert error_message("x" * 1000, limit=20) == "x" * 20
