"""500 schemas through the whole server at temperature 1: whole, streamed, three at a time, among free answers.

The model's weights are random, so a bias towards closing tokens stands in for a model that knows when to stop.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from tests.grammar.schemas import generate_schemas
from tests.serving import Server, running_server

pytestmark = pytest.mark.slow

NUM_SCHEMAS = 500
IN_FLIGHT = 24
MAX_TOKENS = 600
SMALL = ("--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "64", "--kv-cache-memory-gb", "0.3")
# Those that the library checks as RFC 3339 and its like have them; its "time" knows no offset.
FORMATS = jsonschema.FormatChecker(formats=("date", "email", "ipv4", "ipv6", "uuid"))
# Within a string only a quote closes; a comma ends a number, but opens what comes next.
BIAS = {'"': 14, "}": 9, "]": 9, ",": 5}


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tiny_checkpoint, tmp_path_factory.mktemp("structured") / "log", *SMALL) as running:
        yield running


@pytest.fixture(scope="module")
def bias(server: Server) -> dict[str, int]:
    """Towards tokens that are nothing but closing characters, found by asking the server for its vocabulary."""
    found = {}
    with httpx.Client(base_url=server.base_url) as http:
        for text in ('"', "}", "]", ",", '"}', '"]', '",', "}]", "}}", "]}", '"}]', '"}}'):
            # Behind a letter, or the tokenizer puts a space before it.
            body = {"prompt": f"a{text}", "add_special_tokens": False, "return_token_strs": True}
            answer = http.post("/tokenize", json=body).json()
            for token, piece in zip(answer["tokens"], answer["token_strs"], strict=True):
                if set(piece) <= BIAS.keys():
                    found[str(token)] = BIAS[piece[0]]
    assert len(found) >= 4
    return found


async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Text and finish reason of each answer, streamed or not."""
    answers: list[list[Any]] = [["", None] for _ in range(body.get("n", 1))]
    if not body.get("stream"):
        response = await http.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        for choice in response.json()["choices"]:
            answers[choice["index"]] = [choice["message"]["content"], choice["finish_reason"]]
    else:
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200, await response.aread()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line.removeprefix("data: "))["choices"]:
                        answers[choice["index"]][0] += choice["delta"].get("content") or ""
                        answers[choice["index"]][1] = choice["finish_reason"] or answers[choice["index"]][1]
    return [(text, reason) for text, reason in answers]


def make_body(index: int, schema: dict[str, Any], bias: dict[str, int]) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "Fill in the form."}],
        "temperature": 1,
        "seed": index,
        "max_tokens": MAX_TOKENS,
        "logit_bias": bias,
        "response_format": {"type": "json_schema", "json_schema": {"name": "form", "schema": schema, "strict": True}},
    }


def test_every_schema_gives_valid_json_whole_streamed_and_three_at_a_time(server: Server, bias: dict[str, int]) -> None:
    schemas = generate_schemas(NUM_SCHEMAS, seed=7)
    assert len({json.dumps(schema) for schema in schemas}) > NUM_SCHEMAS * 0.9

    async def one(http: httpx.AsyncClient, gate: asyncio.Semaphore, index: int) -> list[tuple[str, str | None]]:
        """Answers to one schema, with a free one in the same batch."""
        body = make_body(index, schemas[index], bias)
        beside = {"messages": body["messages"], "seed": index, "max_tokens": 8, "ignore_eos": True}
        async with gate:
            (whole,), three, free = await asyncio.gather(
                ask(http, body), ask(http, {**body, "n": 3, "stream": True}), ask(http, beside)
            )
        assert three[0] == whole, "streamed and among others, an answer is the same"
        assert [reason for _, reason in free] == ["length"]
        return [whole, *three]

    async def all_of_them() -> list[list[tuple[str, str | None]]]:
        gate = asyncio.Semaphore(IN_FLIGHT)
        async with httpx.AsyncClient(base_url=server.base_url, timeout=300) as http:
            return await asyncio.gather(*map(functools.partial(one, http, gate), range(NUM_SCHEMAS)))

    answers = asyncio.run(all_of_them())
    assert [len(of_schema) for of_schema in answers] == [4] * NUM_SCHEMAS
    endless = {
        index: text[-200:] for index, of_schema in enumerate(answers) for text, reason in of_schema if reason != "stop"
    }
    assert not endless, f"no end within {MAX_TOKENS} tokens"
    for schema, of_schema in zip(schemas, answers, strict=True):
        for text, _ in of_schema:
            jsonschema.validate(json.loads(text), schema, format_checker=FORMATS)
    server.wait_until_idle()
    assert server.metric("kv_cache_usage_perc") == 0
