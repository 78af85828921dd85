"""What tests of the chat endpoint ask it."""

from __future__ import annotations

import json
from typing import Any

import httpx

from server.api.schemas import EXAMPLE_IMAGE
from tests.api.wire import CHAT, data_events

HELLO: list[Any] = [{"role": "user", "content": "Hi"}]
PICTURE: list[Any] = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What is this?"},
            {"type": "image_url", "image_url": {"url": EXAMPLE_IMAGE, "detail": "low"}},
        ],
    }
]


def post(url: str, **fields: Any) -> httpx.Response:
    return httpx.post(url + CHAT, json={"messages": HELLO, **fields}, timeout=10)


def ask(url: str, **fields: Any) -> dict[str, Any]:
    answer = post(url, **fields)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def chunks(url: str, **fields: Any) -> list[dict[str, Any]]:
    answer = post(url, stream=True, **fields)
    assert answer.status_code == 200, answer.text
    return [json.loads(event) for event in data_events(answer.text)]
