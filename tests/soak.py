"""A mixed load for hours, and whether anything grows: `python -m tests.soak --hours 0.5` (`make soak HOURS=…`).

Starts a server of its own. Every ten seconds it notes memory, open files and threads of the API process and of all
that it has started; every two minutes it lets the load stop and looks whether all has been given back. Prints slopes
over the time after the warm-up, and exits non-zero when one is out of bounds. For a day, `--hours 24`: the bounds are
per hour, so only patience differs; take a real checkpoint and the machine that it will run on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from server.demo.checkpoint import write_checkpoint
from tests.conformance import sabotage
from tests.faults.bench import Seen, ask, chat, children, clients, open_files, quantile, status_field
from tests.inputs.loopback import Seen as Asked
from tests.inputs.pictures import as_data_url, encoded, noise, noise_png
from tests.serving import Server, running_server

CLIENTS = 6
FILL_PICTURES = 110  # of 2.9 MB each: more than the 256 MiB of decoded pictures that are kept
SAMPLE_SECONDS = 10.0
PAUSE_SECONDS = 120.0
MAX_MEMORY_SLOPE = 0.5  # percent an hour
MAX_DRIFT = 0.10  # of the second half's p99 over the first's


@dataclass
class Sample:
    """What was there at `time`, in seconds from the start. Memory is MiB, over the API process and its children."""

    time: float
    memory: float
    files: int
    threads: int
    processes: int


@dataclass
class Record:
    samples: list[Sample] = field(default_factory=list)
    answers: list[tuple[float, str, Seen]] = field(default_factory=list)  # when, of what kind
    leftovers: list[str] = field(default_factory=list)  # what was not given back in a pause
    num_pauses: int = 0


class Soak:
    def __init__(self, server: Server, http: httpx.AsyncClient, picture_url: str) -> None:
        self._server = server
        self._http = http
        self._picture_url = picture_url
        self._chance = random.Random(0)
        self._started = time.monotonic()
        self._may_send = asyncio.Event()
        self._may_send.set()
        self.record = Record()

    async def fill_caches(self) -> None:
        """Touch what the server is allowed to keep: memory that it fills for the first time is no leak."""
        for seed in range(FILL_PICTURES):
            picture = {"url": as_data_url(noise_png(980, 980, seed=10**6 + seed)), "detail": "low"}
            await ask(self._http, chat([{"type": "image_url", "image_url": picture}], max_tokens=1))
            await ask(self._http, chat(" ".join(str(seed * 1000 + number) for number in range(150)), max_tokens=1))
        self._started = time.monotonic()

    async def run(self, seconds: float) -> None:
        until = self._started + seconds
        workers = [asyncio.create_task(self._client(until)) for _ in range(CLIENTS)]
        next_pause = self._started + PAUSE_SECONDS
        while time.monotonic() < until:
            await asyncio.sleep(SAMPLE_SECONDS)
            self.record.samples.append(self._sample())
            if time.monotonic() >= next_pause:
                await self._pause()
                next_pause += PAUSE_SECONDS
        self._may_send.set()
        await asyncio.gather(*workers)
        await self._pause()

    async def _client(self, until: float) -> None:
        while time.monotonic() < until:
            await self._may_send.wait()
            kind = self._chance.choices(("text", "images", "url", "leave", "error"), (45, 25, 15, 10, 5))[0]
            seen = await self._send(kind)
            self.record.answers.append((time.monotonic() - self._started, kind, seen))

    async def _send(self, kind: str) -> Seen:
        stream = self._chance.random() < 0.5
        if kind == "error":
            return await ask(self._http, chat(max_tokens=-1))
        body = chat(self._content(kind), max_tokens=self._chance.randrange(1, 60), stream=stream)
        if kind != "leave":
            return await ask(self._http, body)
        task = asyncio.create_task(ask(self._http, body))
        await asyncio.sleep(self._chance.uniform(0, 0.3))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            return await task
        return Seen()

    def _content(self, kind: str) -> Any:
        chance = self._chance
        words = " ".join(str(chance.randrange(10**6)) for _ in range(chance.randrange(1, 200)))
        if kind not in ("images", "url"):
            return words
        count = chance.choice((1, 1, 1, 2, 3, 16)) if kind == "images" else 1
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": self._picture(kind), "detail": "low" if count > 3 else "auto"}}
            for _ in range(count)
        ]
        return [*parts, {"type": "text", "text": words[:100]}]

    def _picture(self, kind: str) -> str:
        chance = self._chance
        if kind == "url":
            return f"{self._picture_url}?{chance.randrange(1000)}"
        width, height = chance.randrange(20, 500), chance.randrange(20, 500)
        if chance.random() < 0.5:
            return as_data_url(noise_png(width, height, seed=chance.randrange(1000)))
        return as_data_url(encoded(noise(width, height, seed=chance.randrange(1000)), "JPEG"))

    def _sample(self) -> Sample:
        pids = [self._server.process.pid]
        for pid in pids:
            with contextlib.suppress(OSError):
                pids += children(pid)
        memory = threads = files = 0
        for pid in pids:
            with contextlib.suppress(OSError, KeyError):  # a helper that has just been replaced
                memory += status_field(pid, "VmRSS")
                threads += status_field(pid, "Threads")
                files += open_files(pid)
        return Sample(time.monotonic() - self._started, memory / 1024, files, threads, len(pids))

    async def _pause(self) -> None:
        """Let the load end, and look at what is still held."""
        self._may_send.clear()
        await _until(self._is_idle, 300.0)
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            value = await asyncio.to_thread(self._server.metric, name)
            if value:
                self.record.leftovers.append(f"{name} {value:g}")
        self.record.num_pauses += 1
        self._may_send.set()

    async def _is_idle(self) -> bool:
        return not (await self._http.get("/load")).json()["server_load"]


async def _until(condition: Callable[[], Awaitable[bool]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not await condition():
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.5)  # the engine tells its numbers once a step


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares, in units a second."""
    if len(points) < 2:
        return 0.0
    middle = sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
    spread = sum((x - middle[0]) ** 2 for x, _ in points)
    return sum((x - middle[0]) * (y - middle[1]) for x, y in points) / spread if spread else 0.0


def report(record: Record, warmup: float) -> bool:
    """Print the table; whether all of it is within bounds."""
    samples = [sample for sample in record.samples if sample.time >= warmup]
    answers = [(when, kind, seen) for when, kind, seen in record.answers if when >= warmup]
    mean = sum(sample.memory for sample in samples) / len(samples)
    memory = slope([(sample.time, sample.memory) for sample in samples]) * 3600
    kinds = Counter((kind, seen.status or "left") for _, kind, seen in record.answers)
    bad = sum(count for (kind, status), count in kinds.items() if isinstance(status, int) and status >= 500)
    cut = sum(seen.status == 200 and not seen.finished for _, kind, seen in record.answers if kind != "leave")
    lost = sum(seen.status == 0 for _, kind, seen in record.answers if kind != "leave")
    half = (samples[0].time + samples[-1].time) / 2
    times = [(when, seen.total) for when, kind, seen in answers if kind == "text" and seen.finished]
    early, late = (quantile([t for when, t in times if (when < half) is first], 0.99) for first in (True, False))
    rows = [
        (
            "memory",
            f"{mean:.0f} MiB, {memory:+.2f} MiB/h = {memory / mean:+.2%}/h",
            memory / mean * 100 < MAX_MEMORY_SLOPE,
        ),
        *(
            (
                name,
                f"{getattr(samples[0], name)} → {getattr(samples[-1], name)}, "
                f"{slope([(sample.time, getattr(sample, name)) for sample in samples]) * 3600:+.2f}/h",
                getattr(samples[-1], name) <= getattr(samples[0], name) + 2,
            )
            for name in ("files", "threads", "processes")
        ),
        (
            "held in pauses",
            f"{', '.join(record.leftovers) or 'nothing'}, {record.num_pauses} pauses",
            not record.leftovers,
        ),
        ("answers 5xx", str(bad), bad == 0),
        ("answers cut off, connections lost", f"{cut}, {lost}", cut == lost == 0),
        ("p99 of text answers, first and second half", f"{early:.2f} s, {late:.2f} s", late <= early * (1 + MAX_DRIFT)),
    ]
    hours = record.samples[-1].time / 3600
    print(f"\n{len(record.answers)} requests in {hours:.2f} h, of them {warmup / 60:.1f} min warm-up")
    print("  " + ", ".join(f"{kind} {status}: {count}" for (kind, status), count in sorted(kinds.items(), key=str)))
    for name, text, ok in rows:
        print(f"  {'ok  ' if ok else 'MISS'} {name}: {text}")
    return all(ok for _, _, ok in rows)


async def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--hours", type=float, default=0.5)
    parser.add_argument("--model", type=Path, help="a checkpoint; default: a tiny one, made here")
    parser.add_argument("--warmup", type=float, default=180.0, metavar="SECONDS", help="not part of any slope")
    parser.add_argument("--samples", type=Path, help="write all samples here, a JSON object a line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = arguments.model or Path(scratch) / "tiny"
        if arguments.model is None:
            write_checkpoint(model, "tiny")

        async def picture(asked: Asked, writer: asyncio.StreamWriter) -> None:
            file = noise_png(64, 48, seed=int(asked.target.partition("?")[2] or 0))
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(file) + file)
            await writer.drain()

        settings = ("--dtype", "float32", "--kv-cache-memory-gb", "0.02", "--max-num-seqs", "8")
        log = Path(scratch) / "log"
        with (
            sabotage.web({"/picture.png": picture}) as origin,
            running_server(model, log, *settings, module=sabotage.__name__) as server,
        ):
            async with clients(server) as http:
                soak = Soak(server, http, f"http://pictures.example:{origin.port}/picture.png")
                await soak.fill_caches()
                await soak.run(arguments.hours * 3600)
            num_tracebacks = log.read_text(encoding="utf-8").count("Traceback")
    if arguments.samples is not None:
        lines = (json.dumps(vars(sample)) + "\n" for sample in soak.record.samples)
        arguments.samples.write_text("".join(lines), encoding="utf-8")
    fine = report(soak.record, arguments.warmup)
    print(f"  {'MISS' if num_tracebacks else 'ok  '} tracebacks in the log: {num_tracebacks}")
    return 0 if fine and not num_tracebacks else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
