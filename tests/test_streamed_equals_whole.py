"""1,000 prompts, each answered whole and as a stream: the same text, the same usage, token by token the same.

The model's weights are random; a bias towards the 256 byte tokens makes answers full of whole, halved and impossible
characters, which is what a detokeniser can get wrong.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving import Server, running_server

pytestmark = pytest.mark.slow

NUM_PROMPTS = 1000
IN_FLIGHT = 48
SMALL = ("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "32", "--kv-cache-memory-gb", "0.1")
FIRST_BYTE_TOKEN = 3  # <0x00>; the other 255 follow
WORDS = (
    *("hello", "the total is", "naïve café", "Ω≈ç√", "¡Hola!", "Привет, мир", "שלום", "مرحبا", "नमस्ते", "สวัสดี"),
    *("日本語のテキスト", "中文字符測試", "한국어", "𠜎𠜱𡿺", "🦊", "👩\u200d👩\u200d👧", "🇩🇪", "e\u0301o\u0308"),
    *("\u2028", "\x85", '"\\/', "\u200b"),
)
# What forces characters that the vocabulary spells in bytes, however random the model is.
PATTERNS = ("(🦊|🐻‍❄️|日本|𠜎| é){3,6}", "[\U0001f600-\U0001f64f]{2,8}", "(a\u0301|b|\u2028|\u2029){4,9}")


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tiny_checkpoint, tmp_path_factory.mktemp("equal") / "log", *SMALL) as running:
        yield running


def make_body(rng: random.Random, index: int) -> dict[str, Any]:
    """A request whose answer is fixed by its seed."""
    prompt = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6)))
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": rng.randint(1, 14),
        "temperature": 1,
        "seed": index,
        "logprobs": True,
        "logit_bias": {str(FIRST_BYTE_TOKEN + byte): rng.choice([3, 6]) for byte in range(256)},
    }
    kind = index % 4
    if kind == 1:
        body["structured_outputs"] = {"regex": rng.choice(PATTERNS)}
        body["max_tokens"] = 60
    elif kind == 2:
        body["stop"] = [rng.choice(["e", "\ufffd", "a ", "\n"])]
    elif kind == 3:
        body["skip_special_tokens"] = False
        body["include_stop_str_in_output"] = True
    return body


async def ask_both(http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """An answer's text, reason, entries and usage: as one, and put together from a stream."""
    whole = (await http.post("/v1/chat/completions", json=body)).json()
    (choice,) = whole["choices"]
    entries = choice["logprobs"]["content"]
    one = {"text": choice["message"]["content"], "reason": choice["finish_reason"], "usage": whole["usage"]}
    streamed: dict[str, Any] = {"text": "", "reason": None, "usage": None}
    pieces = []
    options = {"stream": True, "stream_options": {"include_usage": True}}
    async with http.stream("POST", "/v1/chat/completions", json={**body, **options}) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            for part in chunk["choices"]:
                streamed["text"] += part["delta"].get("content") or ""
                streamed["reason"] = part["finish_reason"] or streamed["reason"]
                pieces += (part["logprobs"] or {}).get("content") or []
            streamed["usage"] = chunk["usage"] or streamed["usage"]
    for answer in (one, streamed):
        answer["usage"]["prompt_tokens_details"].pop("cached_tokens")  # the second to come finds the first one's blocks
    assert [entry["bytes"] for entry in pieces] == [entry["bytes"] for entry in entries]
    one["bytes"] = streamed["bytes"] = b"".join(bytes(entry["bytes"]) for entry in entries)
    return one, streamed


def test_streamed_text_and_usage_equal_the_whole_answers(server: Server) -> None:
    rng = random.Random(0)
    bodies = [make_body(rng, index) for index in range(NUM_PROMPTS)]

    async def ask_all() -> list[tuple[dict[str, Any], dict[str, Any]]]:
        gate = asyncio.Semaphore(IN_FLIGHT)
        async with httpx.AsyncClient(base_url=server.base_url, timeout=120) as http:

            async def ask(body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
                async with gate:
                    return await ask_both(http, body)

            return await asyncio.gather(*map(ask, bodies))

    answers = asyncio.run(ask_all())
    assert len(answers) == NUM_PROMPTS
    for body, (one, streamed) in zip(bodies, answers, strict=True):
        assert streamed == one
        if "stop" not in body:
            assert one["bytes"].decode("utf-8", errors="replace") == one["text"]
    texts = [one["text"] for one, _ in answers]
    assert sum("\ufffd" in text for text in texts) > 100, "too few broken characters to tell anything"
    assert sum(any(ord(character) > 0xFFFF for character in text) for text in texts) > 100
    assert sum(one["reason"] == "stop" for one, _ in answers) > 200
