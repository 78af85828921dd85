"""Stop strings over a stream of text: never lets a part of one out, finds the one that completes first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StopMatch:
    """The stop string that ended an answer, and the text that may still be shown."""

    stop: str
    text: str


class StopMatcher:
    """Holds back only text that could still become a stop string."""

    def __init__(self, stops: Sequence[str], *, include_in_output: bool) -> None:
        self._stops = tuple(stops)
        self._include = include_in_output
        self._held = ""

    def push(self, text: str) -> str | StopMatch:
        """Text that is safe to show, or the match that ends the answer."""
        window = self._held + text
        matches = [(start + len(stop), start, stop) for stop in self._stops if (start := window.find(stop)) >= 0]
        if matches:
            end, start, stop = min(matches)  # the first to be complete; of those, the longest
            self._held = ""
            return StopMatch(stop, window[: end if self._include else start])
        keep = max((_overlap(window, stop) for stop in self._stops), default=0)
        cut = len(window) - keep
        self._held = window[cut:]
        return window[:cut]

    def flush(self) -> str:
        """What was held back, when the answer ended otherwise."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, short of all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
