"""Conformance case 80: after all of the others, nothing is left behind. Runs last; see `conftest.py`."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.conformance.cards import scene_png
from tests.conformance.memory import resident_bytes
from tests.conformance.talk import CHAT, Api, Json, picture, user

GROWTH = 32 << 20


def one_round(api: Api, seed: int) -> None:
    """A bit of everything: texts, pictures, streams, several answers, refusals, clients that leave."""
    pictures = [picture(scene_png(seed * 8 + index), "high") for index in range(3)]
    bodies: list[Json] = [
        {"messages": [user("Hi")], "max_tokens": 20},
        {"messages": [user(*pictures, "What?")], "max_tokens": 20, "stream": True},
        {"messages": [user(pictures[0], "What?")], "max_tokens": 20, "n": 3},
        {"messages": [user("x")], "temperature": 3},
        {"messages": [user(picture(b"GIF89a"))]},
        {"messages": [user("JSON")], "max_tokens": 30, "response_format": {"type": "json_object"}},
    ]
    with ThreadPoolExecutor(len(bodies)) as pool:
        for response in pool.map(api.post, bodies * 2):
            assert response.status_code in (200, 400)
        list(pool.map(lambda _: leave(api), range(8)))
    api.server.wait_until_idle()


def leave(api: Api) -> None:
    body: Any = {"messages": [user("Go on")], "max_tokens": 2000, "ignore_eos": True}
    with contextlib.suppress(httpx.TimeoutException):
        httpx.post(f"{api.server.base_url}{CHAT}", json=body, timeout=0.15)


def test_case_80_nothing_is_left_behind(api: Api) -> None:
    one_round(api, 1000)  # whatever is made once is there now
    before = resident_bytes(api.server.process.pid)
    for number in range(2):
        one_round(api, number)
    assert resident_bytes(api.server.process.pid) - before < GROWTH
    api.server.wait_until_idle()
    assert api.metric("num_requests_running") == 0
    assert api.metric("num_requests_waiting") == 0
    assert api.metric("kv_cache_usage_perc") == 0  # blocks that are only kept for reuse do not count
    assert api.num_bodies >= 100  # each was searched for tracebacks as it came
    assert api.get("/health").json() == {"status": "ok"}
    assert "Traceback" not in api.server.log.read_text()
    answer = api.chat("Still there?", max_tokens=5, ignore_eos=True)
    assert answer.completion_tokens == 5
