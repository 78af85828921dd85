"""Batch files for tests: written, and read back strictly."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHAT = "/v1/chat/completions"


def line(custom_id: str, body: dict[str, Any] | None = None, *, url: str = CHAT) -> dict[str, Any]:
    """One request; the canned server knows it by its `name`."""
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"name": custom_id} if body is None else body}


def write_lines(path: Path, lines: Iterable[dict[str, Any] | str]) -> Path:
    """Objects as JSON, strings as they are."""
    texts = (item if isinstance(item, str) else json.dumps(item) for item in lines)
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read_output(path: Path) -> list[dict[str, Any]]:
    """Every line, each of which has to be whole and of the right shape."""
    content = path.read_bytes()
    assert not content or content.endswith(b"\n")
    records = [json.loads(text) for text in content.decode().split("\n")[:-1]]
    for record in records:
        assert list(record) == ["id", "custom_id", "response", "error"]
        assert (record["response"] is None) != (record["error"] is None)
        assert record["id"].startswith("batch_req_")
        if record["response"] is not None:
            assert list(record["response"]) == ["status_code", "request_id", "body"]
        else:
            assert list(record["error"]) == ["code", "message", "param", "line"]
    assert len({record["id"] for record in records}) == len(records)
    return records


def by_id(records: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Records by their custom_id, none of which may come twice."""
    found = list(records)
    indexed = {record["custom_id"]: record for record in found}
    assert len(indexed) == len(found)
    return indexed
