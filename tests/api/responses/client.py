"""What tests of the responses endpoint ask it."""

from __future__ import annotations

from typing import Any

import httpx

from server.api.schemas import EXAMPLE_IMAGE

PICTURE: list[Any] = [
    {
        "role": "user",
        "content": [
            {"type": "input_text", "text": "What is this?"},
            {"type": "input_image", "image_url": EXAMPLE_IMAGE, "detail": "low"},
        ],
    }
]


def post(url: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{url}/v1/responses", json=body)


def ask(url: str, **fields: Any) -> dict[str, Any]:
    answer = post(url, {"input": "Hi", **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body
