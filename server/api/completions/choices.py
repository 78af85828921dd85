"""Outputs → pieces of text completions: echoed prompts, legacy log-probabilities, where each token stands.

Streamed and whole answers are made of the same pieces. Knows no HTTP.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from server.api.completions.protocol import CompletionChoice, CompletionLogprobs
from server.api.protocol import end_reason
from server.types import Logprob, RequestOutput, Usage

# JSON has no infinity; this is what clients take for it.
MIN_LOGPROB = -9999.0


@dataclass(frozen=True)
class EchoedPrompt:
    """A prompt as its answers tell of it. With echo: its text, and its first token, which nothing is predicted for."""

    token_ids: Sequence[int]
    text: str = ""
    first: Logprob | None = None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a client asked to be told. Without `answer`, what was generated is no part of it."""

    logprobs: bool = False
    token_ids: bool = False
    answer: bool = True


@dataclass(slots=True)
class Piece:
    """What comes next of one choice. Ids are None where they are not told."""

    index: int
    text: str = ""
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Choices:
    """All choices of a response. `prompts` are in order, and each has `n` choices in a row."""

    def __init__(self, prompts: Sequence[EchoedPrompt], n: int, wanted: Wanted) -> None:
        self._wanted = wanted
        self._writers = [
            _ChoiceWriter(prompt_index * n + index, prompt, wanted)
            for prompt_index, prompt in enumerate(prompts)
            for index in range(n)
        ]

    @property
    def count(self) -> int:
        return len(self._writers)

    def write(self, output: RequestOutput) -> Piece:
        """Raises RequestFailedError for an output that the server ended."""
        return self._writers[output.index].write(output)

    def usage(self, usage: Usage) -> Usage:
        """The counts of an output as the client gets them."""
        if self._wanted.answer:
            return usage
        return Usage(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=0,
            cached_tokens=usage.cached_tokens,
            image_tokens=usage.image_tokens,
        )


class _ChoiceWriter:
    def __init__(self, index: int, prompt: EchoedPrompt, wanted: Wanted) -> None:
        self._index = index
        self._prompt = prompt
        self._wanted = wanted
        self._has_begun = False
        self._num_characters = len(prompt.text)
        self._offsets = TextOffsets(self._num_characters)

    def write(self, output: RequestOutput) -> Piece:
        piece = Piece(self._index)
        if self._wanted.logprobs:
            piece.logprobs = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        if not self._has_begun:
            self._has_begun = True
            self._write_prompt(piece, output.prompt_logprobs or ())
        if self._wanted.answer:
            self._write_answer(piece, output)
        elif self._wanted.token_ids:
            piece.token_ids = []
        reason = end_reason(output)
        if reason is not None:
            self._finish(piece, reason, output.stop_reason)
        return piece

    def _write_prompt(self, piece: Piece, entries: Sequence[Logprob]) -> None:
        if self._wanted.token_ids:
            piece.prompt_token_ids = list(self._prompt.token_ids)
        piece.text = self._prompt.text
        if piece.logprobs is not None and self._prompt.first is not None:
            tokens = [self._prompt.first, *entries]
            num_characters = len(b"".join(token.data for token in tokens).decode(errors="replace"))
            # A space that a text begins with may be in none of its tokens.
            start = max(self._num_characters - num_characters, 0)
            _write_logprobs(piece.logprobs, tokens, TextOffsets(start))
            piece.logprobs.token_logprobs[0] = piece.logprobs.top_logprobs[0] = None
            _clamp(piece.logprobs, self._num_characters)

    def _write_answer(self, piece: Piece, output: RequestOutput) -> None:
        piece.text += output.text
        self._num_characters += len(output.text)
        if self._wanted.token_ids:
            piece.token_ids = output.token_ids
        if piece.logprobs is not None:
            _write_logprobs(piece.logprobs, output.logprobs, self._offsets)

    def _finish(self, piece: Piece, reason: Literal["stop", "length"], stop_reason: str | int | None) -> None:
        piece.finish_reason = reason if self._wanted.answer else "length"
        piece.stop_reason = stop_reason if self._wanted.answer else None
        if piece.logprobs is not None:
            # Tokens of a stop string have been cut off with it.
            _clamp(piece.logprobs, self._num_characters)


class TextOffsets:
    """Counts the characters before each token. One inside a character stands where the character does."""

    def __init__(self, start: int = 0) -> None:
        self._position = start
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def next(self, data: bytes) -> int:
        """Where the token stands whose bytes these are."""
        if data and data[0] & 0xC0 != 0x80:
            # A character begins here, so one that was not complete never will be.
            self._position += len(self._decoder.decode(b"", final=True))
        position = self._position
        self._position += len(self._decoder.decode(data))
        return position


def _write_logprobs(lines: CompletionLogprobs, entries: Iterable[Logprob], offsets: TextOffsets) -> None:
    for entry in entries:
        lines.tokens.append(_name(entry))
        lines.token_logprobs.append(max(entry.logprob, MIN_LOGPROB))
        lines.top_logprobs.append(_top(entry))
        lines.text_offset.append(offsets.next(entry.data))


def _top(entry: Logprob) -> dict[str, float]:
    """The likeliest tokens and the token itself. Of tokens that read alike, the likelier one counts."""
    found: dict[str, float] = {}
    for token in (*entry.top, entry):
        found.setdefault(_name(token), max(token.logprob, MIN_LOGPROB))
    return found


def _name(entry: Logprob) -> str:
    """A token as the legacy shape spells it. One that adds nothing to the text has its special token's name."""
    if not entry.data:
        return entry.token
    try:
        return entry.data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in entry.data)


def _clamp(lines: CompletionLogprobs, num_characters: int) -> None:
    lines.text_offset = [min(offset, num_characters) for offset in lines.text_offset]


@dataclass
class _Parts:
    text: list[str] = field(default_factory=list)
    logprobs: CompletionLogprobs | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None


class Collector:
    """Puts pieces together to whole choices."""

    def __init__(self) -> None:
        self._parts: dict[int, _Parts] = {}
        self._choices: dict[int, CompletionChoice] = {}

    def add(self, piece: Piece) -> None:
        parts = self._parts.setdefault(piece.index, _Parts())
        parts.text.append(piece.text)
        parts.logprobs = _join(parts.logprobs, piece.logprobs)
        parts.prompt_token_ids = parts.prompt_token_ids or piece.prompt_token_ids
        if piece.token_ids is not None:
            # A list of its own: equal answers share theirs.
            parts.token_ids = parts.token_ids or []
            parts.token_ids += piece.token_ids
        if piece.finish_reason is not None:
            self._choices[piece.index] = CompletionChoice(
                index=piece.index,
                text="".join(parts.text),
                logprobs=parts.logprobs,
                finish_reason=piece.finish_reason,
                stop_reason=piece.stop_reason,
                prompt_token_ids=parts.prompt_token_ids,
                token_ids=parts.token_ids,
            )

    @property
    def choices(self) -> list[CompletionChoice]:
        """Those that have ended, by index."""
        return [self._choices[index] for index in sorted(self._choices)]


def _join(first: CompletionLogprobs | None, second: CompletionLogprobs | None) -> CompletionLogprobs | None:
    if first is None or second is None:
        return first or second
    first.tokens += second.tokens
    first.token_logprobs += second.token_logprobs
    first.top_logprobs += second.top_logprobs
    first.text_offset += second.text_offset
    return first
