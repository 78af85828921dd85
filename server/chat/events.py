"""An answer out of the bytes of its event stream. Knows the shape of OpenAI's stream and nothing of sockets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from server.chat.errors import ChatError

MAX_EVENT_BYTES = 16 << 20  # a server that never ends a line would fill the memory
MAX_MESSAGE = 500  # characters of a server's own message

_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventParser:
    """Server-sent events, as the HTML standard has them: any of three line ends, comments, data over several lines."""

    def __init__(self) -> None:
        self._rest = b""
        self._after_cr = False  # a LF that comes next belongs to the line end before
        self._data: list[bytes] = []
        self._first_line = True

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The data of each event that this chunk ends. Lines are decoded whole, so that no character is cut in two.

        Raises ChatError for a line of more than MAX_EVENT_BYTES.
        """
        if not chunk:
            return
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        self._after_cr = chunk.endswith(b"\r") if chunk else False
        lines = _LINE_END.split(self._rest + chunk)
        self._rest = lines.pop()
        if len(self._rest) > MAX_EVENT_BYTES:
            raise ChatError(f"the server sent an event of more than {MAX_EVENT_BYTES} bytes")
        for line in lines:
            if self._first_line:
                line = line.removeprefix(b"\xef\xbb\xbf")
                self._first_line = False
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                data = b"\n".join(self._data)
                self._data = []
                yield data.decode("utf-8", "replace")


@dataclass(slots=True)
class Answer:
    """What has arrived of one answer. Times are `time.perf_counter()` seconds; counts are None until the server tells.

    `first` and `last` are of the events with a choice in them, so that a token without text counts as well.
    `is_stopped`: the reader wanted no more of it.
    """

    started: float
    text: str = ""
    first: float | None = None
    last: float | None = None
    finish_reason: str | None = None
    is_done: bool = False
    is_stopped: bool = False
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None

    @property
    def is_whole(self) -> bool:
        return self.is_done or self.finish_reason is not None

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from the request to the first token."""
        return None if self.first is None else self.first - self.started

    @property
    def tokens_per_second(self) -> float | None:
        """Of those after the first, whose time is the prompt's; None where there are too few to tell."""
        if self.first is None or self.last is None or self.completion_tokens is None or self.completion_tokens < 2:
            return None
        seconds = self.last - self.first
        return (self.completion_tokens - 1) / seconds if seconds > 0 else None

    def take(self, data: str, now: float) -> str:
        """The text that one event adds. Raises ChatError for an error event, and for what is no event of a chat's."""
        if data.strip() == "[DONE]":
            self.is_done = True
            return ""
        event = _object(data)
        if event.get("error"):
            raise ChatError(f"the server ended the answer: {error_message(event['error'])}")
        self._take_usage(event.get("usage"))
        choices = event.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return ""
        self.first = now if self.first is None else self.first
        self.last = now
        reason = choices[0].get("finish_reason")
        if isinstance(reason, str):
            self.finish_reason = reason
        delta = choices[0].get("delta")
        content = delta.get("content") if isinstance(delta, dict) else None
        if not isinstance(content, str):
            return ""
        text = without_surrogates(content)
        self.text += text
        return text

    def _take_usage(self, usage: Any) -> None:
        if not isinstance(usage, dict):
            return
        details = usage.get("prompt_tokens_details")
        self.prompt_tokens = _count(usage.get("prompt_tokens"))
        self.completion_tokens = _count(usage.get("completion_tokens"))
        self.cached_tokens = _count(details.get("cached_tokens")) if isinstance(details, dict) else None


def without_surrogates(text: str) -> str:
    """The text as Unicode that can be encoded: halves that belong together are joined, others replaced.

    JSON escapes can spell half a character, and Python keeps bytes of a terminal that are not UTF-8 in the same way.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def error_message(error: Any) -> str:
    """The message inside an error in any of the shapes in use, on one line, cut to MAX_MESSAGE characters.

    Shapes: `{"error": {"message": …}}`, `{"message": …}`, `{"detail": …}`, a plain string.
    """
    if isinstance(error, dict):
        if error.get("error"):
            return error_message(error["error"])
        error = error.get("message") or error.get("detail") or error
    return " ".join(str(error).split())[:MAX_MESSAGE]


def _object(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        raise ChatError("the server sent an event that is not JSON") from None
    if not isinstance(event, dict):
        raise ChatError("the server sent an event that is not a JSON object")
    return event


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
