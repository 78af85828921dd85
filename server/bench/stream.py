"""What happened to one request: reads a chat completion's event stream and keeps times and counts.

Knows the shape of OpenAI's stream and nothing of sockets. Definitions, the same as `vllm bench serve` uses:

    start            just before the request is sent
    first token      the first event with a choice in it
    last token       the last event with a choice in it
    time per token   (last - first) / (completion_tokens - 1)

A gap is the time between two events that carry text. An event may carry several tokens (or none that shows), so gaps
are what a reader sees and the time per token is what the server does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec


class _Delta(msgspec.Struct, gc=False):
    content: str | None = None


class _Choice(msgspec.Struct, gc=False):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Event(msgspec.Struct, gc=False):
    """The fields that are looked at; the decoder skips all others without building them."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


@dataclass(slots=True)
class RequestRecord:
    """One request's life. Times are `time.perf_counter()` seconds; token counts are the server's own.

    `due` is when the arrival process wanted the request sent: `start` is later only when the client is late or its
    limit of requests in flight is reached. Without a usage event `usage_reported` is False and `completion_tokens`
    counts the events that carried text.
    """

    index: int
    due: float
    start: float = 0.0
    first_token: float | None = None
    last_token: float | None = None
    text_times: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None
    usage_reported: bool = False
    finish_reason: str | None = None
    error: str | None = None

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.start

    @property
    def time_to_first_text(self) -> float | None:
        """Later than the first token where a server opens the stream with an empty event before it has a token."""
        return self.text_times[0] - self.start if self.text_times else None

    @property
    def time_per_token(self) -> float | None:
        if self.first_token is None or self.last_token is None or self.completion_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.completion_tokens - 1)

    @property
    def latency(self) -> float | None:
        """From start to last token."""
        return None if self.last_token is None else self.last_token - self.start

    def gaps(self) -> Iterator[float]:
        return (later - earlier for earlier, later in pairwise(self.text_times))


class StreamReader:
    """Feeds one record from the bytes of its stream. A sink of the client: never raises, notes what is wrong instead.

    Lines end in LF, as OpenAI's do; a CR before it is tolerated. Each `data:` line is one event, since JSON has no
    raw line breaks; comments and other fields are skipped.
    """

    def __init__(self, record: RequestRecord) -> None:
        self._record = record
        self._rest = b""
        self._done = False

    def feed(self, data: bytes, now: float) -> None:
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._take(line[5:].strip(), now)

    def close(self) -> None:
        """Call at the end of the stream: fails the record unless the answer was whole.

        A reason to finish and the usage tell that too: `transformers serve` 5.23 never sends [DONE].
        """
        record = self._record
        if not record.usage_reported:
            record.completion_tokens = len(record.text_times)
        if record.error is None:
            if record.finish_reason is None:
                record.error = "stream ended without a finish_reason"
            elif not self._done and not record.usage_reported:
                record.error = "stream ended without [DONE]"

    def _take(self, data: bytes, now: float) -> None:
        if data == b"[DONE]":
            self._done = True
            return
        record = self._record
        try:
            event = _decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            record.error = record.error or f"malformed event: {error}"
            return
        if event.error:
            record.error = record.error or f"error event: {error_message(event.error)}"
        if event.usage is not None:
            self._take_usage(event.usage)
        if event.choices:
            choice = event.choices[0]
            record.last_token = now
            if record.first_token is None:
                record.first_token = now
            if choice.delta is not None and choice.delta.content:
                record.text_times.append(now)
            if choice.finish_reason is not None:
                record.finish_reason = choice.finish_reason

    def _take_usage(self, usage: _Usage) -> None:
        record = self._record
        record.usage_reported = True
        record.prompt_tokens = usage.prompt_tokens
        record.completion_tokens = usage.completion_tokens
        if usage.prompt_tokens_details is not None:
            record.cached_tokens = usage.prompt_tokens_details.cached_tokens


def error_message(error: Any, limit: int = 200) -> str:
    """The message inside an error in any of the shapes in use, cut to `limit` characters, on one line.

    Shapes: `{"error": {"message": …}}`, `{"message": …}`, `{"detail": …}`, a plain string.
    """
    if isinstance(error, dict):
        if error.get("error"):
            return error_message(error["error"], limit)
        error = error.get("message") or error.get("detail") or error
    return " ".join(str(error).split())[:limit]
