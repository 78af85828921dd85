"""Engines that die or hang under load, and the first request that one gets."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import httpx

from tests.faults.bench import Row, Seen, Workbench, ask, chat, clients, gather, median, milliseconds
from tests.inputs.pictures import as_data_url, noise_png
from tests.serving import Server

PLACES = 8
QUEUED = 16
LONG = 4000  # tokens: longer than an engine will live
WAIT_SECONDS = 300.0
MAX_FIRST_RATIO = 1.1
FIRST_SECONDS = 0.010  # what caches of a processor cost that were never filled, whatever the model's size


async def kill_engine(bench: Workbench) -> list[Row]:
    """kill -9 of the engine's process."""
    return await _lose_engine(bench, signal.SIGKILL, cause="died", detect_seconds=1.0)


async def hang_engine(bench: Workbench) -> list[Row]:
    """SIGSTOP of it: nothing says that it is not just slow, but that it uses no processor."""
    return await _lose_engine(bench, signal.SIGSTOP, cause="hung", detect_seconds=3 * 5 + 2)


async def _lose_engine(bench: Workbench, number: signal.Signals, *, cause: str, detect_seconds: float) -> list[Row]:
    """With default settings: as many answers as there are places have begun, half of them streamed; others wait."""
    flags = ("--max-num-seqs", str(PLACES))
    with bench.server(*flags, name=number.name) as server:
        async with clients(server) as http:
            bodies = [chat(f"Tell of {index}.", stream=index % 2 == 0) for index in range(QUEUED)]
            alone = await gather(*(ask(http, body) for body in bodies))
            begun = [asyncio.create_task(ask(http, chat(max_tokens=LONG, stream=i % 2 == 0))) for i in range(PLACES)]
            await asyncio.to_thread(_until_generating, server)
            queued = [asyncio.create_task(ask(http, body)) for body in bodies]
            await _until_here(http, PLACES + QUEUED)
            pid, engine, lost = server.process.pid, server.engine_pid, time.perf_counter()
            os.kill(engine, number)
            not_ready, refused, ready = await _watch(http, lost)
            ended = await gather(*begun)
            answers = await gather(*queued)
            told = max(seen.begun + seen.total for seen in ended) - lost
            restarts = await asyncio.to_thread(server.metric, "engine_restarts_total", f'reason="{cause}"')
            lives = (await http.get("/health/live")).status_code == 200 and server.process.pid == pid
    right = sum(seen.text == before.text and seen.finished for seen, before in zip(answers, alone, strict=True))
    return [
        Row("readiness says 503", f"≤ {detect_seconds:g} s", f"{not_ready:.2f} s", not_ready <= detect_seconds),
        Row(
            "the last begun answer has ended",
            f"≤ {detect_seconds + 1:g} s",
            f"{told:.2f} s",
            told <= 1 + detect_seconds,
        ),
        Row("ready again", f"≤ {WAIT_SECONDS:g} s", f"{ready:.2f} s, {ready - not_ready:.2f} s to start", ready > 0),
        _all("begun and streamed", ended[::2], {"200, then event engine_unavailable": PLACES // 2}),
        _all("begun and not streamed", ended[1::2], {"503 engine_unavailable": PLACES // 2}),
        _all("queued", answers, {"200, whole": QUEUED}),
        Row("queued, with the text that they had before", f"{QUEUED}", f"{right}", right == QUEUED),
        _all("new between two engines", [refused], {"503 engine_restarting": 1}),
        Row("restarts counted", "1", f"{restarts:g}", restarts == 1),
        Row("the API's process", "the same, live", "the same, live" if lives else "another or dead", lives),
    ]


def _all(what: str, seen: list[Seen], expected: Mapping[str, int]) -> Row:
    found = Counter(_in_words(one) for one in seen)
    return Row(what, _listed(expected), _listed(found), found == expected)


def _in_words(seen: Seen) -> str:
    if seen.status != 200:
        return f"{seen.status} {seen.error}"
    return "200, whole" if seen.finished else f"200, then event {seen.error}"


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} × {what}" for what, count in counts.items())


def _until_generating(server: Server) -> None:
    before = server.metric("generation_tokens_total")
    deadline = time.monotonic() + WAIT_SECONDS
    while (
        server.metric("num_requests_running") < PLACES or server.metric("generation_tokens_total") < before + 4 * PLACES
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)


async def _until_here(http: httpx.AsyncClient, count: int) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while (await http.get("/load")).json()["server_load"] != count:
            await asyncio.sleep(0.02)


async def _watch(http: httpx.AsyncClient, lost: float) -> tuple[float, Seen, float]:
    """Seconds after `lost` until the server was not ready, what a request saw then, and until it was ready again."""
    async with asyncio.timeout(WAIT_SECONDS):
        while (await http.get("/health/ready")).status_code == 200:
            await asyncio.sleep(0.01)
        not_ready = time.perf_counter() - lost
        refused = await ask(http, chat("Too early."))
        while (await http.get("/health/ready")).status_code != 200:
            await asyncio.sleep(0.05)
    return not_ready, refused, time.perf_counter() - lost


async def first_request(bench: Workbench, *flags: str, rounds: int = 3, steady: int = 9) -> list[Row]:
    """Time to first token of the very first request of a server, against later ones of the same kind."""
    kinds = {"text": _text, "picture in five tiles": _picture}
    firsts: dict[str, list[float]] = {kind: [] for kind in kinds}
    later: dict[str, list[float]] = {kind: [] for kind in kinds}
    for kind, make in kinds.items():
        for number in range(rounds):
            with bench.server(*flags, name=f"first-{number}") as server:
                async with clients(server) as http:
                    await http.get("/health/live")  # the connection is not what is measured
                    firsts[kind].append((await ask(http, make(0))).first)
                    later[kind] += [(await ask(http, make(index))).first for index in range(1, 1 + steady)]
    rows = []
    for kind in kinds:
        first, usual = median(firsts[kind]), median(later[kind])
        seen = f"{milliseconds(first)}, later {milliseconds(usual)}, ratio {first / usual:.2f}"
        limit = max(MAX_FIRST_RATIO * usual, usual + FIRST_SECONDS)
        expected = f"≤ {MAX_FIRST_RATIO} × later, or {milliseconds(FIRST_SECONDS)} more"
        rows.append(Row(f"first token of the first {kind}", expected, seen, first <= limit))
    return rows


def _text(index: int) -> dict[str, Any]:
    """About 300 tokens, of which no others are found in a cache. No two are of one length: what a matrix library makes
    for a new shape is no matter of the first request alone."""
    return chat(f"{index} " + f"word{index} " * (76 + 5 * index % 11), stream=True)


def _picture(index: int) -> dict[str, Any]:
    body = chat(stream=True)
    url = as_data_url(noise_png(980, 735, seed=index))
    image = {"type": "image_url", "image_url": {"url": url, "detail": "high"}}
    parts = [image, {"type": "text", "text": "What is it?"}]
    body["messages"] = [{"role": "user", "content": parts}]
    return body
