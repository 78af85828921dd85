"""Large bodies: what is read and parsed of them leaves the event loop to others in between."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

from fastapi import Request

from server.api import body
from server.api.body import LARGE_BYTES, LARGE_PIECE_BYTES, read_json_object

NUM_UPLOADS = 8


def upload(app: Any, content: bytes) -> Request:
    pieces = [content[start : start + LARGE_PIECE_BYTES] for start in range(0, len(content), LARGE_PIECE_BYTES)]

    async def receive() -> dict[str, Any]:
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    headers = [(b"content-type", b"application/json")]
    return Request({"type": "http", "method": "POST", "headers": headers, "app": app}, receive)


async def turns_of_parsing(monkeypatch: Any, content: bytes) -> list[int]:
    """In which turn of the event loop each of the uploads, all here at once, is parsed."""
    turn, seen, parse = 0, [], body._parse

    def counting(data: bytes) -> dict[str, Any]:
        seen.append(turn)
        return parse(data)

    async def others() -> None:
        nonlocal turn
        while len(seen) < NUM_UPLOADS:
            turn += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(body, "_parse", counting)
    app = SimpleNamespace(state=SimpleNamespace(parsing=asyncio.Lock()))
    found = await asyncio.gather(others(), *(read_json_object(upload(app, content)) for _ in range(NUM_UPLOADS)))
    assert found[1:] == [json.loads(content)] * NUM_UPLOADS
    return seen


def test_large_bodies_that_end_together_are_parsed_one_in_a_turn(monkeypatch: Any) -> None:
    seen = asyncio.run(turns_of_parsing(monkeypatch, json.dumps({"text": "x" * LARGE_BYTES}).encode()))
    assert len(set(seen)) == NUM_UPLOADS


def test_small_ones_wait_for_nobody(monkeypatch: Any) -> None:
    assert len(set(asyncio.run(turns_of_parsing(monkeypatch, b'{"text": "x"}')))) == 1
