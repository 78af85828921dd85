"""More requests than the server can answer: some are sent away at once, the others notice nothing."""

from __future__ import annotations

import asyncio
import random
import time

import httpx

from tests.faults.bench import Row, Seen, Workbench, ask, chat, clients, median, milliseconds, quantile

SECONDS = 20.0
SETTINGS = ("--max-num-seqs", "4", "--max-num-queued-reqs", "4")
# Answers so long that ten times as many requests cost their client little.
BODY = chat(max_tokens=160, stream=True, stream_options={"include_usage": True})


async def overload(bench: Workbench) -> list[Row]:
    """An open loop of Poisson arrivals at 0.7, 3 and 10 times the peak, which a closed loop of all places has shown."""
    with bench.server(*SETTINGS) as server:
        async with clients(server) as http:
            await _closed_loop(http, 5.0)
            peak = await _closed_loop(http, SECONDS)
            fine = await _open_loop(http, 0.7 * peak)
            rows = [Row("peak, all 4 places taken", "a rate", f"{peak:.1f} requests/s", peak > 0)]
            for factor in (3, 10):
                seen = await _open_loop(http, factor * peak)
                rows += _judge(factor, peak, fine, seen)
            began = time.perf_counter()
            after = await ask(http, BODY)
            seconds = time.perf_counter() - began
            rows.append(
                Row("a request right after it", "answered within 5 s", f"{after.status}, {seconds:.1f} s", seconds < 5)
            )
    return rows


async def _closed_loop(http: httpx.AsyncClient, seconds: float) -> float:
    """Answers a second with as many clients as places."""
    until = time.perf_counter() + seconds
    done = 0

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < until:
            seen = await ask(http, BODY)
            done += seen.finished

    await asyncio.gather(*(client() for _ in range(4)))
    return done / seconds


async def _open_loop(http: httpx.AsyncClient, rate: float) -> list[Seen]:
    chance = random.Random(0)
    due, tasks = time.perf_counter(), []
    until = due + SECONDS
    while due < until:
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        tasks.append(asyncio.create_task(ask(http, BODY)))
        due += chance.expovariate(rate)
    return list(await asyncio.gather(*tasks))


def _judge(factor: int, peak: float, fine: list[Seen], seen: list[Seen]) -> list[Row]:
    answered = [one for one in seen if one.status == 200]
    refused = [one for one in seen if one.status == 429]
    duration = max(one.begun + one.total for one in answered) - min(one.begun for one in answered)
    throughput = sum(one.finished for one in answered) / duration
    first, unhurried = quantile([one.first for one in answered], 0.99), quantile([one.first for one in fine], 0.99)
    # All places and the whole queue before it: two rounds of answers at the most.
    bound = (4 + 4) / peak + unhurried
    rejection = quantile([one.total for one in refused], 0.99)
    waits = [int(one.retry_after or 0) for one in refused]
    return [
        Row(
            f"{factor}×: what comes back",
            "200 or 429, all 200s whole",
            f"{len(answered)} answered, {len(refused)} sent away of {len(seen)}",
            len(answered) + len(refused) == len(seen) and all(one.finished for one in answered),
        ),
        Row(
            f"{factor}×: time to first token of those answered, p99",
            f"within a full queue's wait, {milliseconds(bound)}",
            f"{milliseconds(first)} (median {milliseconds(median([one.first for one in answered]))})",
            first <= bound,
        ),
        Row(f"{factor}×: a refusal, p99", "under 20 ms", milliseconds(rejection), rejection < 0.02),
        Row(
            f"{factor}×: Retry-After",
            "in every refusal",
            f"{min(waits, default=0)} to {max(waits, default=0)} s",
            all(1 <= wait <= 60 for wait in waits),
        ),
        Row(
            f"{factor}×: throughput",
            "at least 95% of the peak",
            f"{throughput / peak:.1%} ({throughput:.1f}/s)",
            throughput >= 0.95 * peak,
        ),
    ]
