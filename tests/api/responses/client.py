"""What tests of the responses endpoint ask it. Every answer is held against its description and the SDK's."""

from __future__ import annotations

import json
from typing import Any

import httpx
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from server.api.responses.answer import ResponseObject
from server.api.schemas import EXAMPLE_IMAGE
from server.types import FinishReason
from tests.api.scripted_llm import say

SDK_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
PICTURE: list[Any] = [
    {
        "role": "user",
        "content": [
            {"type": "input_text", "text": "What is this?"},
            {"type": "input_image", "image_url": EXAMPLE_IMAGE, "detail": "low"},
        ],
    }
]


class Receipt(BaseModel):
    shop: str
    total: float


RECEIPT = Receipt(shop="ABC", total=2.5)
RECEIPT_SCRIPT = (say('{"shop": "A'), say('BC", "total": 2.5}'), say("", FinishReason.STOP))


def post(url: str, **fields: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/responses", json={"input": "Hi", **fields}, timeout=10)


def ask(url: str, **fields: Any) -> dict[str, Any]:
    answer = post(url, **fields)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    assert ResponseObject.model_validate(body).model_dump(mode="json") == body
    Response.model_validate(body)
    return body


def parse(text: str) -> list[dict[str, Any]]:
    """Events as a strict reader sees them: the name says the type, and numbers count them."""
    parsed = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        parsed.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {parsed[-1]['type']}"
        SDK_EVENT.validate_python(parsed[-1])
    assert [event["sequence_number"] for event in parsed] == list(range(len(parsed)))
    return parsed


def stream(url: str, **fields: Any) -> list[dict[str, Any]]:
    answer = post(url, stream=True, **fields)
    assert answer.status_code == 200, answer.text
    return parse(answer.text)
