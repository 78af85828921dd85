"""A picture to send: a file of this machine, looked at before anything is sent, or an address for the server."""

from __future__ import annotations

import base64
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.chat.errors import ChatError

DETAILS = ("auto", "low", "high")
MAX_FILE_BYTES = 20 << 20  # what servers take as they come: ServerConfig.max_image_bytes, and OpenAI's own limit

_MAX_NAME = 60


@dataclass(frozen=True, slots=True)
class Picture:
    """`url` is what is sent; `size` is the file's in bytes, None for an address."""

    name: str
    url: str
    detail: str = "auto"
    size: int | None = None

    def part(self) -> dict[str, Any]:
        """As a part of a message. The detail `auto` is what a server does anyway, and not all know the field."""
        image = {"url": self.url} if self.detail == "auto" else {"url": self.url, "detail": self.detail}
        return {"type": "image_url", "image_url": image}

    def __str__(self) -> str:
        size = "" if self.size is None else f", {_readable(self.size)}"
        return f"{self.name} (detail {self.detail}{size})"


def find_picture(place: str, detail: str = "auto") -> Picture:
    """The picture at a path, where `~` is the home folder, or at an http(s) or data URL.

    Raises ChatError: no such file, not a file, empty, too large, or of a type that servers do not take.
    """
    if detail not in DETAILS:
        raise ChatError(f"detail must be one of {', '.join(DETAILS)}, not {detail!r}")
    scheme = place[:8].lower()
    if scheme.startswith("data:"):
        return Picture("data URL", place, detail)
    if scheme.startswith(("http://", "https://")):
        return Picture(place if len(place) <= _MAX_NAME else f"{place[: _MAX_NAME - 1]}…", place, detail)
    data = _read(place)
    kind = _mime_type(data)
    if kind is None:
        raise ChatError(f"{place} is not a JPEG, PNG, WebP or GIF file")
    url = f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return Picture(Path(place).name, url, detail, len(data))


def _read(place: str) -> bytes:
    try:
        path = Path(place).expanduser()
        status = path.stat()
        # Before it is opened: opening a pipe waits until somebody writes into it.
        if not stat.S_ISREG(status.st_mode):
            raise ChatError(f"{place} is {'a folder' if stat.S_ISDIR(status.st_mode) else 'not a regular file'}")
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ChatError(f"cannot read {place}: {reason}") from None
    if not data:
        raise ChatError(f"{place} is empty")
    if len(data) > MAX_FILE_BYTES:
        size = max(status.st_size, len(data))
        raise ChatError(f"{place} is too large: {_readable(size)}, the limit is {_readable(MAX_FILE_BYTES)}")
    return data


def _mime_type(data: bytes) -> str | None:
    """By the first bytes: a name may say anything, and servers look at the bytes too."""
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "image/webp"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    return None


def _readable(size: int) -> str:
    if size < 1 << 10:
        return f"{size} bytes"
    return f"{size / (1 << 10):.1f} KiB" if size < 1 << 20 else f"{size / (1 << 20):.1f} MiB"
