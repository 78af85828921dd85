"""What may be shown: text of strangers without what commands a terminal, and dim lines where a terminal has them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TextIO

from server.chat.events import Answer

DIM, RESET = "\x1b[2m", "\x1b[0m"

# C0 as the pictures that Unicode has for them. C1 begins escape sequences too, where a terminal takes 8 bits. A lone
# surrogate cannot be encoded. A carriage return would overwrite what stands before it; text lines end without it.
_HARMLESS: dict[int, int | None] = {
    **{code: 0x2400 + code for code in range(0x20)},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
    **dict.fromkeys(range(0xD800, 0xE000), 0xFFFD),
    ord("\r"): None,
}
del _HARMLESS[ord("\n")], _HARMLESS[ord("\t")]


def harmless(text: str) -> str:
    """The text without control characters, newline and tab aside. Each character for itself, so pieces may be cut."""
    return text.translate(_HARMLESS)


def is_styled(out: TextIO, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether escape sequences may be used: a terminal that knows them, and NO_COLOR (no-color.org) does not object."""
    return out.isatty() and environ.get("TERM", "dumb") != "dumb" and not environ.get("NO_COLOR")


class Screen:
    """Writes to one stream. Whatever it is given, no control character but newline and tab comes out."""

    def __init__(self, out: TextIO, *, styled: bool) -> None:
        self._out = out
        self._styled = styled
        self._at_line_start = True

    def stream(self, text: str) -> None:
        """A piece of an answer, at once."""
        if not text:
            return
        self._at_line_start = text.endswith("\n")  # first: Ctrl-C may come as soon as anything is written
        self._out.write(harmless(text))
        self._out.flush()

    def end_line(self) -> None:
        if not self._at_line_start:
            self._out.write("\n")
            self._out.flush()
            self._at_line_start = True

    def say(self, text: str) -> None:
        """A whole line, or several."""
        self.end_line()
        self._out.write(harmless(text) + "\n")
        self._out.flush()

    def note(self, text: str) -> None:
        """The same, dim."""
        self.end_line()
        text = harmless(text)
        self._out.write(f"{DIM}{text}{RESET}\n" if self._styled else f"{text}\n")
        self._out.flush()


def usage_line(answer: Answer) -> str:
    """What an answer cost and how it came; parts that the server has not told are left out."""
    parts = []
    if answer.prompt_tokens is not None:
        cached = f" ({answer.cached_tokens} cached)" if answer.cached_tokens else ""
        parts.append(f"{answer.prompt_tokens} prompt tokens{cached}")
    if answer.completion_tokens is not None:
        parts.append(f"{answer.completion_tokens} completion tokens")
    if answer.time_to_first_token is not None:
        parts.append(f"first after {answer.time_to_first_token:.2f} s")
    if answer.tokens_per_second is not None:
        parts.append(f"{answer.tokens_per_second:.1f} tokens/s")
    if answer.finish_reason not in (None, "stop"):
        parts.append(f"finish reason: {answer.finish_reason}")
    return ", ".join(parts)
