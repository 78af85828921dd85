"""Stop strings, against a matcher that sees one character at a time and all text so far."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from server.outputs.stop import StopMatch, StopMatcher


def naive(text: str, stops: Sequence[str], *, include: bool) -> tuple[str, str | None]:
    """The shown text and the stop that ended it: character by character, the longest of those that complete."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return (text[:end] if include else text[: end - len(stop)]), stop
    return text, None


def feed(pieces: Sequence[str], stops: Sequence[str], *, include: bool = False) -> tuple[list[str], str | None]:
    """What each push shows, with what a flush adds, and the stop that ended it."""
    matcher = StopMatcher(stops, include_in_output=include)
    shown: list[str] = []
    for piece in pieces:
        found = matcher.push(piece)
        if isinstance(found, StopMatch):
            assert matcher.flush() == "", "text held back after the end"
            return [*shown, found.text], found.stop
        shown.append(found)
    return [*shown, matcher.flush()], None


@pytest.mark.parametrize(
    ("pieces", "stops", "shown", "stop"),
    [
        (["Hello", " world"], [], ["Hello", " world", ""], None),
        (["one", "\n", "two"], ["\n"], ["one", ""], "\n"),
        (["\n"], ["\n"], [""], "\n"),
        (["END", "_", "OF"], ["END_OF"], ["", "", ""], "END_OF"),
        (["text E", "ND_O", "F more"], ["END_OF"], ["text ", "", ""], "END_OF"),
        (["text E", "ND_O", "N"], ["END_OF"], ["text ", "", "END_ON", ""], None),  # let go when it cannot become one
        (["text E", "ND"], ["END_OF"], ["text ", "", "END"], None),  # let go at the end
        (["aab"], ["ab"], ["a"], "ab"),
        (["a", "a", "b"], ["ab"], ["", "a", ""], "ab"),  # the held `a` is free when another follows
        (["abab", "abc"], ["ababc"], ["", "ab"], "ababc"),  # restarts inside itself
        (["🦊 stop 三"], ["三"], ["🦊 stop "], "三"),
    ],
)
def test_what_each_delta_shows(pieces: list[str], stops: list[str], shown: list[str], stop: str | None) -> None:
    assert feed(pieces, stops) == (shown, stop)


def test_the_first_to_be_complete_wins_not_the_first_to_begin() -> None:
    assert feed(["abcdef"], ["abcdef", "cd"]) == (["ab"], "cd")
    assert feed(["abc", "def"], ["abcdef", "cd"]) == (["", "ab"], "cd")


def test_the_longest_wins_where_several_complete_at_once() -> None:
    for stops in (["cd", "bcd", "d"], ["d", "bcd", "cd"]):
        assert feed(["ab", "cd"], stops) == (["a", ""], "bcd")
        assert feed(["b", "cd"], stops, include=True) == (["", "bcd"], "bcd")


def test_the_first_occurrence_counts() -> None:
    assert feed(["a. b. c"], ["."]) == (["a"], ".")


def test_the_stop_is_shown_when_asked_for_and_nothing_after_it() -> None:
    assert feed(["a END", " b"], ["END"], include=True) == (["a END"], "END")
    assert feed(["a E", "ND b"], ["END"], include=True) == (["a ", "END"], "END")
    assert feed(["abc", "def"], ["abcdef", "cd"], include=True) == (["", "abcd"], "cd")


def test_flush_gives_what_was_held_once() -> None:
    matcher = StopMatcher(["END"], include_in_output=False)
    assert matcher.push("text EN") == "text "
    assert matcher.flush() == "EN"
    assert matcher.flush() == ""
    assert matcher.push("D") == "D"  # what was flushed is no longer part of a stop


def test_without_stops_nothing_is_held() -> None:
    matcher = StopMatcher([], include_in_output=False)
    assert matcher.push("anything") == "anything"
    assert matcher.flush() == ""


LETTERS = st.text(alphabet="ab\n三", max_size=5)


@given(
    st.lists(LETTERS, max_size=12),
    st.lists(st.text(alphabet="ab\n三", min_size=1, max_size=5), max_size=4),
    st.booleans(),
)
@example(["a", "", "a", "b"], ["ab"], False)
@example(["aa", "ab"], ["aab", "ab", "b"], True)
@settings(max_examples=1500, deadline=None)
def test_equals_the_naive_matcher_and_leaks_nothing(pieces: list[str], stops: list[str], include: bool) -> None:
    text = "".join(pieces)
    expected, expected_stop = naive(text, stops, include=include)
    shown, stop = feed(pieces, stops, include=include)
    assert ("".join(shown), stop) == (expected, expected_stop)

    matcher = StopMatcher(stops, include_in_output=include)
    seen = out = ""
    for piece in pieces:
        found = matcher.push(piece)
        if isinstance(found, StopMatch):
            return
        seen, out = seen + piece, out + found
        # What is held is exactly the longest end that may still become a stop: no leak, and no needless wait.
        held = seen.removeprefix(out)
        assert out + held == seen
        ends = [end for end in (seen[i:] for i in range(len(out))) if any(stop.startswith(end) for stop in stops)]
        assert not ends, "a beginning of a stop was let out"
        assert held == "" or any(stop.startswith(held) for stop in stops)
