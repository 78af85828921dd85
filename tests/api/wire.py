"""What goes over the wire: requests as bytes on a socket of the test's own, and answers as text."""

from __future__ import annotations

import json
import socket
from typing import Any
from urllib.parse import urlsplit

CHAT = "/v1/chat/completions"


def begin(url: str, *headers: str, timeout: float = 5, receive_buffer: int | None = None) -> socket.socket:
    """A connection on which the head of a POST of JSON has been sent, and nothing of its body."""
    address = urlsplit(url)
    made = socket.socket()
    made.settimeout(timeout)
    if receive_buffer is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    made.connect((address.hostname, address.port))
    lines = [f"POST {address.path} HTTP/1.1", "Host: x", "Content-Type: application/json", *headers]
    made.sendall("".join(f"{line}\r\n" for line in [*lines, ""]).encode())
    return made


def send(url: str, body: dict[str, Any], *, receive_buffer: int | None = None) -> socket.socket:
    """A connection on which a POST has been sent."""
    content = json.dumps(body).encode()
    made = begin(url, f"Content-Length: {len(content)}", receive_buffer=receive_buffer)
    made.sendall(content)
    return made


def read_until(made: socket.socket, wanted: bytes) -> None:
    seen = b""
    while wanted not in seen:
        received = made.recv(65536)
        assert received, f"closed after {seen[-200:]!r}"
        seen += received


def data_events(text: str) -> list[str]:
    """The data of each event of a whole stream, but for the last, which says that it is done."""
    assert text.endswith("\n\n")
    events = text.removesuffix("\n\n").split("\n\n")
    assert events.pop() == "data: [DONE]"
    return [event.removeprefix("data: ") for event in events]


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def usage(prompt_tokens: int, completion_tokens: int, *, cached_tokens: int = 0, image_tokens: int = 0) -> Any:
    """As chat and completions tell it, in that order."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": cached_tokens,
            "image_tokens": image_tokens,
            "text_tokens": prompt_tokens - image_tokens,
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
            "audio_tokens": 0,
        },
    }
