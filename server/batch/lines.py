"""The input of a batch: a file's lines, one at a time, each either a request or what is wrong with it.

Knows the format of a line. Does not know HTTP, the output, or which lines were answered before.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

# As much as any server here can be set up to take. A file without line breaks must not fill the memory.
MAX_LINE_BYTES = 1 << 30

_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20
_PATH = re.compile(r"/v1(/[A-Za-z0-9_-]+)+")


@dataclass(frozen=True, slots=True)
class Request:
    """What a good line asks for. `number` counts the lines of the file from 1; `body` is JSON, as it was written."""

    number: int
    custom_id: str
    url: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Rejection:
    """What is wrong with a line. `custom_id` is None where it has none that can be used."""

    number: int
    custom_id: str | None
    code: str
    message: str
    param: str | None = None


class _Line(msgspec.Struct):
    custom_id: Any = None
    method: Any = None
    url: Any = None
    body: msgspec.Raw = msgspec.Raw(b"")


class _Body(msgspec.Struct):
    stream: Any = None


def count_lines(path: Path) -> int:
    """Lines of a file, also a last one without its line break. Reads the file once, a mebibyte at a time."""
    count, last = 0, b"\n"
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            count += chunk.count(b"\n")
            last = chunk[-1:]
    return count + (last != b"\n")


def read_lines(path: Path, *, max_bytes: int = MAX_LINE_BYTES) -> Iterator[tuple[int, bytes | None]]:
    """The number and content of each line that is not blank; None for a line of more than `max_bytes`.

    One line is held at a time. A byte order mark at the start of the file is not part of a line. Raises OSError.
    """
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(max_bytes + 1):
            number += 1
            if len(raw) > max_bytes:
                while raw and not raw.endswith(b"\n"):
                    raw = file.readline(_CHUNK)
                yield number, None
                continue
            if number == 1:
                raw = raw.removeprefix(_BOM)
            if raw and not raw.isspace():
                yield number, raw


def parse_line(number: int, raw: bytes | None, urls: frozenset[str] | None) -> Request | Rejection:
    """One line of input. `urls` are the paths that can be asked; None: every path under /v1, whoever answers it."""
    if raw is None:
        return Rejection(number, None, "line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        raw.decode()  # what is passed over below is not looked at, and would be sent as it is
        line = msgspec.json.decode(raw, type=_Line)
    except msgspec.ValidationError:
        return Rejection(number, None, "invalid_type", "the line must be a JSON object")
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Rejection(number, None, "invalid_json_line", "the line is not valid JSON")
    custom_id = line.custom_id
    if custom_id is None:
        return Rejection(number, None, "missing_required_parameter", "the line has no 'custom_id'", "custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return Rejection(number, None, "invalid_type", "'custom_id' must be a string that is not empty", "custom_id")
    return _request(number, custom_id, line, urls)


def _request(number: int, custom_id: str, line: _Line, urls: frozenset[str] | None) -> Request | Rejection:
    if line.method != "POST":
        return Rejection(number, custom_id, "invalid_method", "'method' must be 'POST'", "method")
    url = line.url
    if not isinstance(url, str) or not (_PATH.fullmatch(url) if urls is None else url in urls):
        known = "a path under /v1" if urls is None else "one of " + ", ".join(sorted(urls))
        return Rejection(number, custom_id, "invalid_url", f"'url' must be {known}", "url")
    body = bytes(line.body)
    if not body:
        return Rejection(number, custom_id, "missing_required_parameter", "the line has no 'body'", "body")
    try:
        stream = msgspec.json.decode(body, type=_Body).stream
    except msgspec.ValidationError:
        return Rejection(number, custom_id, "invalid_type", "'body' must be a JSON object", "body")
    if stream is True:
        message = "a batch has nobody to stream to: 'body.stream' must be false or absent"
        return Rejection(number, custom_id, "unsupported_value", message, "body.stream")
    return Request(number, custom_id, url, body)
