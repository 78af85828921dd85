"""An answer that calls functions: from its text, piece by piece, to what a client is told.

Two forms. A named call is nothing but its arguments. Other calls are a JSON array of {"name", "arguments"} objects, or
one such object. Arguments are passed on as the model writes them, not parsed: a client that streams sees every piece.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, Protocol

FinishName = Literal["stop", "length", "tool_calls"]

# What stands before the arguments of a call, whitespace aside. None is the name.
_HEAD = ("{", '"name"', ":", None, ",", '"arguments"', ":", "{")
_WHITESPACE = frozenset(" \t\n\r")
# Text held back longer than any head is text.
_MAX_HELD = 512


@dataclass(frozen=True)
class Content:
    text: str


@dataclass(frozen=True)
class CallStart:
    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the arguments' JSON."""

    index: int
    text: str


Piece = Content | CallStart | CallArguments


class CallParser(Protocol):
    """Reads one choice."""

    def push(self, text: str) -> list[Piece]:
        """What `text` adds. It may be nothing yet."""

    def flush(self) -> list[Piece]:
        """What was held back, when nothing follows any more."""

    def finish_name(self, reason: Literal["stop", "length"]) -> FinishName:
        """What the client is told that the choice ended with."""


class NamedCallParser:
    """All text is the arguments of the one function that had to be called."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = False

    def push(self, text: str) -> list[Piece]:
        pieces: list[Piece] = [] if self._started else [_start(0, self._name)]
        self._started = True
        return [*pieces, CallArguments(0, text)] if text else pieces

    def flush(self) -> list[Piece]:
        return []

    def finish_name(self, reason: Literal["stop", "length"]) -> FinishName:
        return reason


class CallArrayParser:
    """Finds calls of `names` at the start of an answer. What is no call, or follows the calls, is content.

    Text is held back only as long as it may still become a call. Calls after the first `max_calls` are dropped.
    """

    def __init__(self, names: Collection[str], *, max_calls: int) -> None:
        self._names = names
        self._max_calls = max_calls
        self._read = self._read_opening
        self._held = ""
        self._is_array = False
        self._num_calls = 0
        # Within a head: which part of it, how much of that is there, and the name.
        self._part = 0
        self._given = ""
        self._name = ""
        # Within arguments.
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def push(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        position = 0
        while position < len(text):
            position = self._read(text, position, pieces)
        return pieces

    def flush(self) -> list[Piece]:
        held, self._held = self._held, ""
        return [Content(held)] if held.strip() else []

    def finish_name(self, reason: Literal["stop", "length"]) -> FinishName:
        return "tool_calls" if reason == "stop" and self._num_calls else reason

    # Each reads from `position` on, and returns how far it has come; then `_read` says who goes on.

    def _read_opening(self, text: str, position: int, pieces: list[Piece]) -> int:
        char = text[position]
        if char == "[" and not self._is_array:
            self._is_array = True
        elif char not in _WHITESPACE:
            self._read = self._read_head
            return position
        return self._hold(char, position, pieces)

    def _read_head(self, text: str, position: int, pieces: list[Piece]) -> int:
        char = text[position]
        part = _HEAD[self._part]
        if not self._given and char in _WHITESPACE:
            return self._hold(char, position, pieces)
        self._given += char
        complete = self._given == part
        if part is None:
            complete = len(self._given) > 1 and char == '"'
            possible = self._is_name(complete)
        else:
            possible = part.startswith(self._given)
        if not possible:
            return self._give_up(position, pieces)
        position = self._hold(char, position, pieces)
        if complete:
            self._part += 1
            self._given = ""
        if self._part == len(_HEAD):
            self._begin_arguments(pieces)
        return position

    def _is_name(self, complete: bool) -> bool:
        """Whether what is there of a name, with its quotes, can be or is one of the tools'."""
        if complete:
            self._name = self._given[1:-1]
            return self._name in self._names
        return self._given[0] == '"' and any(name.startswith(self._given[1:]) for name in self._names)

    def _begin_arguments(self, pieces: list[Piece]) -> None:
        self._held = ""
        self._part = 0
        self._depth = 1
        self._read = self._read_arguments
        self._num_calls += 1
        if self._num_calls <= self._max_calls:
            pieces += [_start(self._num_calls - 1, self._name), CallArguments(self._num_calls - 1, "{")]

    def _read_arguments(self, text: str, position: int, pieces: list[Piece]) -> int:
        end = position
        while end < len(text) and self._depth:
            self._read_json_character(text[end])
            end += 1
        if self._num_calls <= self._max_calls:
            pieces.append(CallArguments(self._num_calls - 1, text[position:end]))
        if not self._depth:
            self._read = self._read_call_end
        return end

    def _read_json_character(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._in_string:
            self._escaped = char == "\\"
            self._in_string = char != '"'
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1

    def _read_call_end(self, text: str, position: int, pieces: list[Piece]) -> int:
        char = text[position]
        if char == "}":
            self._read = self._read_separator if self._is_array else self._read_content
        elif char not in _WHITESPACE:
            self._read = self._read_content
            return position
        return position + 1

    def _read_separator(self, text: str, position: int, pieces: list[Piece]) -> int:
        char = text[position]
        if char == ",":
            self._read = self._read_head
        elif char == "]":
            self._read = self._read_content
        elif char not in _WHITESPACE:
            self._read = self._read_content
            return position
        return position + 1

    def _read_content(self, text: str, position: int, pieces: list[Piece]) -> int:
        """Nothing is a call any more. Whitespace between the calls and what follows is nobody's."""
        rest = text[position:] if not self._num_calls or self._held else text[position:].lstrip()
        if self._held or rest:
            pieces.append(Content(self._held + rest))
            self._held = ""
            self._read = self._read_rest
        return len(text)

    def _read_rest(self, text: str, position: int, pieces: list[Piece]) -> int:
        pieces.append(Content(text[position:]))
        return len(text)

    def _hold(self, char: str, position: int, pieces: list[Piece]) -> int:
        if len(self._held) == _MAX_HELD:
            return self._give_up(position, pieces)
        self._held += char
        return position + 1

    def _give_up(self, position: int, pieces: list[Piece]) -> int:
        self._read = self._read_content
        return position


def _start(index: int, name: str) -> CallStart:
    return CallStart(index=index, id=f"call_{uuid.uuid4().hex}", name=name)
