"""What one client's load does to another's answers."""

from __future__ import annotations

import asyncio
import base64
import itertools
import random
from collections import Counter
from typing import Any

import httpx

from tests.faults.bench import CHAT, Row, Seen, Workbench, ask, chat, clients, median, milliseconds, quantile
from tests.faults.probe import Probe, probe
from tests.inputs.pictures import as_data_url, encoded, noise

PROBES = 20
FLOOD = 40


async def fairness(bench: Workbench) -> list[Row]:
    """One key keeps forty requests there; another asks once in a while."""
    keys = {"flood": "flood-0123456789abcdef", "victim": "victim-0123456789abcdef"}
    file = bench.folder / "keys"
    file.write_text("".join(f"{name}={key}\n" for name, key in keys.items()), encoding="utf-8")
    file.chmod(0o600)
    headers = {name: {"authorization": f"Bearer {key}"} for name, key in keys.items()}
    with bench.server("--api-key-file", str(file), "--max-num-seqs", "8") as server:
        async with clients(server) as http:
            alone = await _ask_now_and_then(server.base_url, headers["victim"])
            stop = asyncio.Event()
            flooding = [asyncio.create_task(_flood(http, headers["flood"], number, stop)) for number in range(FLOOD)]
            await asyncio.sleep(2)
            beside = await _ask_now_and_then(server.base_url, headers["victim"])
            stop.set()
            flood = list(itertools.chain.from_iterable(await asyncio.gather(*flooding)))
    first, solo = quantile([one.first for one in beside], 0.95), quantile([one.first for one in alone], 0.95)
    gap = median([gap for seen in flood for gap in seen.gaps])
    return [
        Row("the victim's answers", "all 200", str(Counter(one.status for one in beside)), _all_ok(beside)),
        Row("the flood's answers", "all whole", _share(flood), _all(flood)),
        Row(
            "the victim's time to first token beside the flood, p95",
            "at most 2 times that alone, or two steps of the full batch more",
            f"{first / solo:.2f} times ({milliseconds(first)} after {milliseconds(solo)}; "
            f"a step beside it takes {milliseconds(gap)})",
            first <= max(2 * solo, solo + 2 * gap),
        ),
    ]


async def _ask_now_and_then(url: str, headers: dict[str, str]) -> list[Probe]:
    body = chat("a probe", max_tokens=8, stream=True)
    return await probe(url, CHAT, count=PROBES, pause=0.3, headers=headers, body=body)


async def _flood(http: httpx.AsyncClient, headers: dict[str, str], number: int, stop: asyncio.Event) -> list[Seen]:
    found = []
    for turn in itertools.count():
        if stop.is_set():
            return found
        body = chat(f"{number} {turn} " * 20, max_tokens=200, stream=True, priority=-100)
        found.append(await ask(http, body, headers=headers))
    raise AssertionError("unreachable")


async def pictures(bench: Workbench) -> list[Row]:
    """Twenty streams, and pictures split in five that arrive beside them."""
    chance = random.Random(0)
    with bench.server("--max-num-seqs", "32") as server:
        async with clients(server) as http:
            await ask(http, _with_picture(chance))
            quiet = await _streams(http)
            task = asyncio.create_task(_streams(http))
            arriving = []
            await asyncio.sleep(0.5)
            while not task.done():
                arriving.append(asyncio.create_task(ask(http, _with_picture(chance))))
                await asyncio.sleep(0.2)
            busy = await task
            answered = await asyncio.gather(*arriving)
            step = await asyncio.to_thread(_largest_encode, http, server.base_url)
    gaps, calm = [gap for seen in busy for gap in seen.gaps], [gap for seen in quiet for gap in seen.gaps]
    bound = 2 * quantile(calm, 0.99) + step
    return [
        Row("streams", "all whole", _share(busy), _all(busy)),
        Row("pictures", "all answered", _share(answered), _all(answered)),
        Row(
            "gaps between tokens while pictures arrive, p99",
            f"at most 2 times the quiet p99 and one tile, {milliseconds(bound)}",
            f"{milliseconds(quantile(gaps, 0.99))} (quiet {milliseconds(quantile(calm, 0.99))}, "
            f"largest {milliseconds(max(gaps))})",
            quantile(gaps, 0.99) <= bound,
        ),
    ]


async def _streams(http: httpx.AsyncClient) -> list[Seen]:
    bodies = (chat(f"{number}", max_tokens=150, stream=True) for number in range(20))
    return list(await asyncio.gather(*(ask(http, body) for body in bodies)))


def _with_picture(chance: random.Random) -> dict[str, Any]:
    file = encoded(noise(640, 480, seed=chance.randrange(9**9)), "JPEG", quality=80)
    image = {"url": "data:image/jpeg;base64," + base64.b64encode(file).decode(), "detail": "high"}
    return chat([{"type": "image_url", "image_url": image}], max_tokens=4)


def _largest_encode(http: httpx.AsyncClient, url: str) -> float:
    """Seconds of the slowest tile, as the histogram of encodings bounds it."""
    text = httpx.get(f"{url}/metrics").text
    buckets = []
    for line in text.splitlines():
        if line.startswith("idefics2:image_encode_seconds_bucket"):
            bound = line.split('le="')[1].split('"')[0]
            buckets.append((float(bound), float(line.rsplit(" ", 1)[1])))
    total = max((count for _, count in buckets), default=0.0)
    return min((bound for bound, count in buckets if count >= total), default=0.0)


async def uploads(bench: Workbench) -> list[Row]:
    """64 pictures of 12 megapixels at once, as base64, while the health of the server is asked for."""
    file = encoded(noise(4000, 3000), "JPEG", quality=60)
    body = chat([{"type": "image_url", "image_url": {"url": as_data_url(file)}}], max_tokens=1)
    with bench.server("--max-num-seqs", "64", "--image-decode-timeout", "60") as server:
        async with clients(server) as http:
            await ask(http, body)
            calm = await probe(server.base_url, "/health/live", seconds=5, pause=0.02)
            await asyncio.to_thread(server.metric, "event_loop_lag_seconds")  # what came before does not count
            polling = asyncio.create_task(probe(server.base_url, "/health/live", seconds=15, pause=0.02))
            sending = [asyncio.create_task(ask(http, body)) for _ in range(64)]
            answered = await asyncio.gather(*sending)
            polls, quiet = [one.total for one in await polling], [one.total for one in calm]
            lag = await asyncio.to_thread(server.metric, "event_loop_lag_seconds")
            stalls = await asyncio.to_thread(server.metric, "event_loop_stalls_total", 'cause="loop"')
    size = len(file) / (1 << 20)
    return [
        Row(
            f"64 uploads of {size:.1f} MiB",
            "all answered",
            _share(answered),
            _all(answered),
        ),
        Row(
            "/health/live meanwhile, p99",
            "under 50 ms",
            f"{milliseconds(quantile(polls, 0.99))} of {len(polls)} (quiet {milliseconds(quantile(quiet, 0.99))})",
            quantile(polls, 0.99) < 0.05,
        ),
        Row(
            "stalls of the event loop over 100 ms by what ran on it",
            "none",
            f"{stalls:.0f} (longest wait for it, whatever the cause, {milliseconds(lag)})",
            stalls == 0,
        ),
    ]


def _all(found: list[Seen]) -> bool:
    return bool(found) and all(seen.finished for seen in found)


def _share(found: list[Seen]) -> str:
    return f"{sum(seen.finished for seen in found)} of {len(found)}"


def _all_ok(found: list[Probe]) -> bool:
    return bool(found) and all(one.status == 200 for one in found)
