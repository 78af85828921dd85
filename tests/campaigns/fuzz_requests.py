"""Hostile requests against a real server: `python -m tests.campaigns.fuzz_requests --count 20000 --seed 0 [--url URL]`.

Without a URL, starts a server of the demo model. Prints what happened, and exits with 1 if anything happened that must
not: a 5xx, an answer that is no HTTP, JSON or event stream, text of one request in an error, in the log or in another's
answer, an engine that died, an event loop that stood still, or something that is not given back in the end.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import uvloop

from tests.campaigns.answers import problems, streamed_text
from tests.campaigns.fuzz_report import Result
from tests.campaigns.hostile_requests import CANARY_PREFIX, Generator, Hostile, harmless_request
from tests.campaigns.processes import Held, held_by
from tests.campaigns.wire import Answer, Connection, Line, get

CONNECTIONS = 32
ANSWER_SECONDS = 60.0
POLL_SECONDS = 0.1
NEIGHBOUR_SECONDS = 0.5
WARM_UP = 1_000
SERVER_FLAGS = ("--max-model-len", "448", "--max-num-seqs", "32", "--num-threads", "1", "--kv-cache-memory-gb", "0.1")
GROWTH_MEBIBYTES = 100.0  # of the server itself; an engine's libraries remember every shape that they have met

STALL = "the event loop computed for more than 0.1 s and served nobody"


class Campaign:
    """`pid` and `log` are the server's where it runs on this machine."""

    def __init__(self, url: str, *, seed: int, pid: int | None = None, log: Path | None = None) -> None:
        address = urlsplit(url)
        self._host, self._port = address.hostname or "127.0.0.1", address.port or 80
        self._url = url.rstrip("/")
        self._pid = pid
        self._log = log
        with httpx.Client(base_url=self._url, timeout=30) as http:
            page = http.get("/openapi.json").json()
        self.generator = Generator(page, seed=seed)
        self.result = Result()

    async def run(self, count: int) -> Result:
        started, own = time.monotonic(), time.process_time()
        polls = asyncio.gather(self._poll(), self._be_a_neighbour())
        first = min(WARM_UP, count)
        await self._send(range(first))
        await self._settle()
        # What grows only once, as threads and caches do, has grown now.
        self.result.before = held_by(self._pid) if self._pid else []
        stalls_before = await self._stalls()
        await self._send(range(first, count))
        if polls.done():
            polls.result()  # it has failed
        polls.cancel()
        await asyncio.gather(polls, return_exceptions=True)
        self.result.seconds = time.monotonic() - started
        self.result.own_seconds = time.process_time() - own
        await self._settle()
        self.result.stalls = {
            cause: seen - stalls_before.get(cause, 0.0) for cause, seen in (await self._stalls()).items()
        }
        if self.result.stalls.get("loop"):
            self.result.miss(STALL)
        self._check_leftovers()
        self._check_log()
        return self.result

    async def _send(self, numbers: range) -> None:
        shared = iter(numbers)
        await asyncio.gather(*(self._client(shared) for _ in range(CONNECTIONS)))

    async def _client(self, numbers: Iterator[int]) -> None:
        async with self._line() as line:
            for number in numbers:
                request = self.generator.request(number)
                self.result.families[request.family] += 1
                connection = await line.open()
                started = time.monotonic()
                answer = await self._exchange(connection, request)
                self._note(request, answer, time.monotonic() - started)
                if answer is None or not answer.is_whole:
                    await connection.close()

    def _line(self) -> Line:
        return Line(self._connect)

    async def _connect(self) -> Connection:
        for _ in range(50):
            try:
                return await Connection.open(self._host, self._port)
            except OSError as error:
                self.result.miss(f"no connection: {error}")
                await asyncio.sleep(0.2)
        raise ConnectionError("the server accepts no connections any more")

    async def _exchange(self, connection: Connection, request: Hostile) -> Answer | None:
        """None: the client left."""
        patience = ANSWER_SECONDS if request.leaves_after is None else request.leaves_after
        try:
            async with asyncio.timeout(patience):
                return await connection.exchange(request.pieces, pause=0.005, has_body=request.has_answer_body)
        except TimeoutError:
            if request.leaves_after is None:
                self.result.miss(f"no answer within {ANSWER_SECONDS:g} s", request.number)
            return None

    def _note(self, request: Hostile, answer: Answer | None, seconds: float) -> None:
        if answer is None:
            self.result.statuses[request.endpoint, "left"] += 1
            return
        self.result.statuses[request.endpoint, str(answer.status)] += 1
        self.result.slowest = sorted([*self.result.slowest, (seconds, request.number, request.family)])[-5:]
        for problem in problems(request, answer):
            self.result.miss(problem, request.number)

    async def _poll(self) -> None:
        """Whether the server is said to be alive, and how soon."""
        async with self._line() as line:
            while True:
                connection = await line.open()
                started = time.monotonic()
                answer = await connection.exchange([get("/health/live")])
                self.result.live_seconds.append(time.monotonic() - started)
                if answer.status != 200:
                    self.result.miss(f"/health/live says {answer.status}")
                await asyncio.sleep(POLL_SECONDS)

    async def _be_a_neighbour(self) -> None:
        """Somebody who asks the same harmless question all the time, about a picture, and always gets one answer."""
        expected: str | None = None
        async with self._line() as line:
            while True:
                connection = await line.open()
                answer = await connection.exchange([harmless_request()])
                if answer.status != 429:
                    text = streamed_text(answer.body)
                    expected = expected or text
                    if answer.status != 200 or text != expected:
                        self.result.miss(f"a harmless request got another answer ({answer.status})")
                    self.result.neighbours += 1
                await asyncio.sleep(NEIGHBOUR_SECONDS)

    # -- what the server tells of itself -------------------------------------------------------------------------

    async def _metrics(self) -> str:
        async with self._line() as line:
            answer = await (await line.open()).exchange([get("/metrics")])
        text = answer.body.decode()
        self.result.lag = max(self.result.lag, _value(text, "event_loop_lag_seconds"))
        return text

    async def _stalls(self) -> dict[str, float]:
        found = re.findall(r'^idefics2:event_loop_stalls_total{cause="(\w+)"[^}]*} (\S+)$', await self._metrics(), re.M)
        return {cause: float(count) for cause, count in found}

    async def _settle(self) -> None:
        """Wait until nothing runs, waits or is held. What stays is a miss."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        for _ in range(100):
            text = await self._metrics()
            left = {name: value for name in names if (value := _value(text, name))}
            if not left:
                return
            await asyncio.sleep(0.1)
        for name, value in left.items():
            self.result.miss(f"{name} stays at {value:g}")

    def _check_leftovers(self) -> None:
        if not self._pid:
            return
        self.result.after = held_by(self._pid)
        before, after = _by_role(self.result.before), _by_role(self.result.after)
        for role in before.keys() | after.keys():
            if len(before.get(role, ())) != len(after.get(role, ())):
                self.result.miss(f"processes: {len(before.get(role, ()))} → {len(after.get(role, ()))} of {role}")
        for old, new in zip(before.get("server", ()), after.get("server", ()), strict=False):
            # A few come and go: what a scrape needs, and a pool's threads that are made when all others are busy.
            if new.files > old.files + 4 or new.threads > old.threads + 8:
                self.result.miss(f"server: files {old.files} → {new.files}, threads {old.threads} → {new.threads}")
            if new.memory > old.memory + GROWTH_MEBIBYTES:
                self.result.miss(f"server: {old.memory:.0f} → {new.memory:.0f} MiB")
        engines = [{held.pid for held in found.get("engine", ())} for found in (before, after)]
        if engines[0] != engines[1]:
            self.result.miss("the engine was replaced")

    def _check_log(self) -> None:
        if self._log is None:
            return
        text = self._log.read_text(errors="replace")
        for what, sign in (("text of a request", CANARY_PREFIX), ("a traceback", "Traceback"), ("an error", " ERROR ")):
            if sign in text:
                line = next(line for line in text.splitlines() if sign in line)
                self.result.miss(f"the log has {what}: {line[:300]}")


def _by_role(held: list[Held]) -> dict[str, list[Held]]:
    return {role: list(found) for role, found in itertools.groupby(sorted(held, key=_role), key=_role)}


def _role(held: Held) -> str:
    return held.role


def _value(text: str, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^idefics2:{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE))


@contextmanager
def own_server() -> Iterator[tuple[str, int, Path]]:
    """A server of the demo model: its address, process and log."""
    from server.demo.checkpoint import write_checkpoint
    from tests.serving import running_server

    with tempfile.TemporaryDirectory() as folder:
        checkpoint, log = Path(folder) / "model", Path(folder) / "server.log"
        write_checkpoint(checkpoint, "tiny")
        with running_server(checkpoint, log, *SERVER_FLAGS, OMP_NUM_THREADS="1") as server:
            try:
                yield server.base_url, server.process.pid, log
            except Exception:
                print(f"exit status {server.process.poll()}, last lines of the log:", file=sys.stderr)
                print(*log.read_text(errors="replace").splitlines()[-20:], sep="\n", file=sys.stderr)
                raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="of a server that runs already; then its processes and its log are not looked at")
    parser.add_argument("--show", type=int, nargs="*", help="print these requests of the seed instead")
    options = parser.parse_args()
    if options.url:
        campaign = Campaign(options.url, seed=options.seed)
        return _run(campaign, options)
    with own_server() as (url, pid, log):
        return _run(Campaign(url, seed=options.seed, pid=pid, log=log), options)


def _run(campaign: Campaign, options: argparse.Namespace) -> int:
    if options.show is not None:
        for number in options.show:
            print(campaign.generator.request(number))
        return 0
    result = uvloop.run(campaign.run(options.count))
    print(result.table())
    return 1 if result.misses else 0


if __name__ == "__main__":
    sys.exit(main())
