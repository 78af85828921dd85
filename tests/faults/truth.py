"""Whether the metrics say what clients have seen."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import httpx

from tests.faults.bench import CHAT, Row, Workbench, chat, clients
from tests.inputs.pictures import as_data_url, noise_png
from tests.serving import Server

COUNT = 400


async def metrics(bench: Workbench) -> list[Row]:
    """A mixed load of which every answer is kept; then sums on both sides."""
    chance = random.Random(0)
    with bench.server("--max-num-seqs", "8", "--max-num-queued-reqs", "24") as server:
        async with clients(server) as http:
            before = await asyncio.to_thread(_counters, server)
            gate = asyncio.Semaphore(64)  # more than there are places: some are sent away
            tasks = [asyncio.create_task(_one(http, gate, _body(chance))) for _ in range(COUNT)]
            answers = await asyncio.gather(*tasks)
            await asyncio.to_thread(server.wait_until_idle)
            after = await asyncio.to_thread(_counters, server)
    told = {name: after[name] - before[name] for name in after}
    statuses = Counter(status for status, _ in answers)
    usages = [usage for status, usage in answers if status == 200]
    sums = {
        "prompt": sum(usage["prompt_tokens"] for usage in usages),
        "completion": sum(usage["completion_tokens"] for usage in usages),
        "image": sum(usage["prompt_tokens_details"]["image_tokens"] for usage in usages),
        "cached": sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages),
    }
    return [
        Row("statuses", "only 200, 400 and 429", str(dict(statuses)), set(statuses) <= {200, 400, 429}),
        _same("HTTP requests with status 200", told["ok"], statuses[200]),
        _same("HTTP requests with status 400", told["bad"], statuses[400]),
        _same("HTTP requests with status 429", told["full"], statuses[429]),
        _same("refused for capacity", told["refused"], statuses[429]),
        _same("tokens generated", told["generated"], sums["completion"]),
        _same("prompt tokens of all requests", told["prompt_length"], sums["prompt"]),
        _same("prompt tokens found in the cache", told["hits"], sums["cached"]),
        Row("pictures were among them", "some", f"{sums['image']} image tokens", sums["image"] > 0),
        _same("running and waiting afterwards", after["running"] + after["waiting"], 0),
        _same("KV cache in use afterwards", after["kv"], 0),
    ]


def _same(what: str, seen: float, expected: float) -> Row:
    return Row(what, f"{expected:g}", f"{seen:g}", seen == expected)


def _body(chance: random.Random) -> dict[str, Any]:
    kind = chance.random()
    if kind < 0.1:
        return chat(max_tokens=-1)
    content: Any = " ".join(chance.choice("abcdef") for _ in range(chance.randrange(1, 60)))
    if kind < 0.3:
        image = {"url": as_data_url(noise_png(60, 40, seed=chance.randrange(20))), "detail": "low"}
        content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": content}]
    return chat(content, max_tokens=chance.randrange(1, 20))


async def _one(http: httpx.AsyncClient, gate: asyncio.Semaphore, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    async with gate:
        answer = await http.post(CHAT, json=body)
        return answer.status_code, answer.json().get("usage", {})


def _counters(server: Server) -> dict[str, float]:
    def http(status: int) -> float:
        return _or_zero(server, "http_requests_total", f'handler="{CHAT}",method="POST",status="{status}"')

    return {
        "ok": http(200),
        "bad": http(400),
        "full": http(429),
        "refused": _or_zero(server, "admission_rejections_total"),
        "generated": server.metric("generation_tokens_total"),
        "prompt_length": server.metric("request_prompt_tokens_sum"),
        "hits": server.metric("prefix_cache_hits_total"),
        "running": server.metric("num_requests_running"),
        "waiting": server.metric("num_requests_waiting"),
        "kv": server.metric("kv_cache_usage_perc"),
    }


def _or_zero(server: Server, name: str, labels: str = "") -> float:
    """A metric with labels has no samples before it has counted something."""
    try:
        return server.metric(name, labels)
    except AssertionError:
        return 0.0
