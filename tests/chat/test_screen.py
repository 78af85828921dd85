from __future__ import annotations

import io

import pytest

from server.chat.events import Answer
from server.chat.screen import Screen, harmless, is_styled, usage_line


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_control_character_comes_through() -> None:
    everything = "".join(map(chr, range(0x110000)))
    through = harmless(everything)
    assert [char for char in through if ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0] == ["\t", "\n"]
    through.encode()  # no half of a character either
    assert harmless("häß 😀 \u200d日本") == "häß 😀 \u200d日本"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", "␛]0;title␇"),
        ("\x1b[2J\x1b[31mred", "␛[2J␛[31mred"),
        ("\x9b31m", "�31m"),
        ("a\bb\x7f\0", "a␈b␡␀"),
        ("over\rwritten\r\n", "overwritten\n"),
    ],
)
def test_sequences_are_shown_instead_of_obeyed(text: str, shown: str) -> None:
    assert harmless(text) == shown
    assert "".join(map(harmless, text)) == shown  # however it is cut


def test_whatever_is_written_is_harmless() -> None:
    out = io.StringIO()
    screen = Screen(out, styled=False)
    screen.stream("\x1b[2J")
    screen.say("\x1b[3J")
    screen.note("\x1b[4J")
    assert out.getvalue() == "␛[2J\n␛[3J\n␛[4J\n"


def test_lines_begin_at_the_left() -> None:
    out = io.StringIO()
    screen = Screen(out, styled=True)
    for piece in ("a", "", "b\n", ""):
        screen.stream(piece)
    screen.end_line()
    screen.note("n")
    screen.stream("c")
    screen.end_line()
    screen.end_line()
    assert out.getvalue() == "ab\n\x1b[2mn\x1b[0m\nc\n"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": ""}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
        ({}, False),
    ],
)
def test_style_is_for_terminals_that_have_it(environ: dict[str, str], expected: bool) -> None:
    assert is_styled(Tty(), environ) is expected
    assert is_styled(io.StringIO(), environ) is False


def test_the_usage_line() -> None:
    answer = Answer(
        started=10.0,
        first=10.5,
        last=12.5,
        finish_reason="length",
        prompt_tokens=74,
        completion_tokens=9,
        cached_tokens=64,
    )
    assert usage_line(answer) == (
        "74 prompt tokens (64 cached), 9 completion tokens, first after 0.50 s, 4.0 tokens/s, finish reason: length"
    )
    answer.cached_tokens, answer.finish_reason = 0, "stop"
    assert usage_line(answer) == "74 prompt tokens, 9 completion tokens, first after 0.50 s, 4.0 tokens/s"
    assert usage_line(Answer(started=1.0)) == ""
