"""What all clients say: messages, pictures, schemas, and a logit bias under which random weights finish a JSON value.

Knows nothing of any client's package.
"""

from __future__ import annotations

import base64
import io
import random
from enum import StrEnum
from typing import Any, Literal

import httpx
from PIL import Image
from pydantic import BaseModel, Field

MODEL = "tiny"
# A split picture has four more crops than a whole one: 64 tokens each, and what stands between them.
SPLITTING_TOKENS = 260


class Kind(StrEnum):
    RECEIPT = "receipt"
    CHART = "chart"
    PHOTO = "photo"


class Item(BaseModel):
    name: str
    price: float
    tags: list[Literal["food", "drink"]] = Field(max_length=3)


class Document(BaseModel):
    """What structured answers are asked for: nesting, a reference used twice, an enum, a union with null."""

    kind: Kind
    first: Item
    items: list[Item] = Field(min_length=1, max_length=4)
    note: str | None
    pages: int
    is_signed: bool


class Verdict(BaseModel):
    """Whatever is sampled, this ends by itself."""

    kind: Kind
    is_legible: bool


class Weather(BaseModel):
    """A function's arguments."""

    city: Literal["Bern", "Oslo", "Rome"]
    days: Literal[1, 2, 3]


def picture_url(width: int = 90, height: int = 70, *, seed: int = 0, image_format: str = "PNG") -> str:
    """A data URL of noise."""
    noise = random.Random(seed).randbytes(width * height * 3)
    encoded = io.BytesIO()
    Image.frombytes("RGB", (width, height), noise).save(encoded, image_format)
    return f"data:image/{image_format.lower()};base64,{base64.b64encode(encoded.getvalue()).decode()}"


def picture(url: str, detail: str | None = None) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url} | ({"detail": detail} if detail else {})}


def user(*parts: dict[str, Any] | str) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


def closing_bias(base_url: str) -> dict[str, int]:
    """Token id → bias. The end of what is open is likelier than all else, and going on likelier than whitespace.

    Without it random weights fill a string until they run out of tokens. Quotes come first, because in a string
    brackets are letters like others.
    """
    weights = {'"': 100, "}": 75, "]": 75, ",": 50, ":": 50}
    return {str(_token_id(base_url, character)): weight for character, weight in weights.items()}


def _token_id(base_url: str, character: str) -> int:
    """The id of a character that stands right behind another one."""
    body = {"prompt": f"a{character}", "add_special_tokens": False}
    token_id: int = httpx.post(f"{base_url}/tokenize", json=body).raise_for_status().json()["tokens"][-1]
    back = httpx.post(f"{base_url}/detokenize", json={"tokens": [token_id]}).raise_for_status().json()["prompt"]
    assert back == character, f"{character!r} is not a token: {token_id} is {back!r}"
    return token_id
