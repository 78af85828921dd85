"""Behind the load balancer: streams pass as they come, and what happens to replicas is nobody's business.

Needs Debian's nginx; run by `make test-deploy`.
"""

from __future__ import annotations

import asyncio
import json
import signal
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.deploy.conftest import Replica, nginx, replicas
from tests.faults.bench import Seen, ask, chat

pytestmark = pytest.mark.deploy

RATE = 20  # requests a second
LIVENESS_TRIES = 3


def client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=200))


def by_replica(log: Path, backends: list[Replica]) -> Counter[int]:
    """How many requests each was given, by nginx's log."""
    ports = {f"127.0.0.1:{backend.port}": backend.port for backend in backends}
    found: Counter[int] = Counter()
    for line in log.read_text().splitlines():
        found.update(port for address, port in ports.items() if "/v1/" in line and address in line)
    return found


def departures(file: Path) -> list[float]:
    """What a server notes once it is done with a stream, which may be after its client."""
    deadline = time.monotonic() + 10
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    times: list[float] = json.loads(file.read_text())
    return times


def test_events_pass_as_they_come(three: tuple[str, list[Replica]], capsys: pytest.CaptureFixture[str]) -> None:
    url, backends = three

    async def arrivals(http: httpx.AsyncClient, name: str) -> list[float]:
        times = []
        body = chat("Count.", max_tokens=200, stream=True)
        async with http.stream("POST", "/v1/chat/completions", json=body, headers={"x-request-id": name}) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data:"):
                    times.append(time.monotonic())
        return times

    async def scenario() -> list[float]:
        delays = []
        async with client(url) as http:
            names = [f"stream-{number}" for number in range(6)]
            for name, times in zip(names, await asyncio.gather(*(arrivals(http, name) for name in names)), strict=True):
                left = await asyncio.to_thread(departures, backends[0].folder / name)
                assert len(left) == len(times) > 200
                assert left[-1] - left[0] > 0.5, "the engine was too fast for this to tell anything"
                delays += [arrival - departure for arrival, departure in zip(times, left, strict=True)]
        return delays

    delays = asyncio.run(scenario())
    with capsys.disabled():
        print(f"\nfrom server to client: median {1e3 * statistics.median(delays):.1f} ms, ", end="")
        print(f"most {1e3 * max(delays):.1f} ms of {len(delays)} events", end=" ")
    assert max(delays) < 0.05
    assert min(delays) > 0


def test_the_least_busy_gets_what_comes(three: tuple[str, list[Replica]]) -> None:
    url, backends = three
    before = by_replica(backends[0].folder / "nginx.log", backends)

    async def scenario() -> None:
        async with client(url) as http:
            answers = await asyncio.gather(*(ask(http, chat(f"{number}", max_tokens=100)) for number in range(12)))
            assert {seen.status for seen in answers} == {200}

    asyncio.run(scenario())
    after = by_replica(backends[0].folder / "nginx.log", backends)
    assert [after[backend.port] - before[backend.port] for backend in backends] == [4, 4, 4]


def test_what_is_inside_stays_inside(three: tuple[str, list[Replica]]) -> None:
    url, _ = three
    assert httpx.get(f"{url}/metrics").status_code == 404
    assert httpx.get(f"{url}/v1/models").status_code == 200
    answer = httpx.get(f"{url}/v1/models", headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert "server" not in answer.headers or "/" not in answer.headers["server"]


def test_a_limit_is_told_and_not_tried_elsewhere(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with replicas(tiny_checkpoint, tmp_path, 2) as backends, nginx(tmp_path, backends) as url:
        big = {"messages": [{"role": "user", "content": "x" * (33 << 20)}]}
        assert httpx.post(f"{url}/v1/chat/completions", json=big, timeout=30).status_code == 413
        bad = httpx.post(f"{url}/v1/chat/completions", json=chat(max_tokens=0))
        assert bad.status_code == 400
        (line,) = [line for line in (tmp_path / "nginx.log").read_text().splitlines() if " 400 " in line]
        assert line.count("127.0.0.1:") == 1


@asynccontextmanager
async def load(http: httpx.AsyncClient) -> AsyncIterator[list[Seen]]:
    """RATE requests a second, every third streamed, until the end of the block; then all that they saw."""
    tasks: list[asyncio.Task[Seen]] = []
    seen: list[Seen] = []
    ended = asyncio.Event()

    async def send() -> None:
        started, number = time.monotonic(), 0
        while not ended.is_set():
            body = chat(f"Number {number}.", max_tokens=20 + number % 40, stream=number % 3 == 0)
            tasks.append(asyncio.ensure_future(ask(http, body)))
            number += 1
            await asyncio.sleep(max(started + number / RATE - time.monotonic(), 0))

    sender = asyncio.ensure_future(send())
    try:
        yield seen
    finally:
        ended.set()
        await sender
        seen += await asyncio.gather(*tasks)


def failures(seen: list[Seen]) -> list[tuple[int, str]]:
    return [(one.status, one.error) for one in seen if not (one.status == 200 and one.finished)]


def restart(replica: Replica) -> None:
    replica.signal(signal.SIGTERM)
    assert replica.wait() == 0
    replica.start()
    replica.wait_until_ready()


def test_a_rolling_restart_of_all_loses_nothing_over_three_rounds(
    three: tuple[str, list[Replica]], capsys: pytest.CaptureFixture[str]
) -> None:
    url, backends = three

    async def scenario() -> list[Seen]:
        async with client(url) as http, load(http) as seen:
            await asyncio.sleep(1)
            for _ in range(3):
                for backend in backends:
                    await asyncio.to_thread(restart, backend)
                    await asyncio.sleep(0.5)
        return seen

    seen = asyncio.run(scenario())
    with capsys.disabled():
        print(f"\n{len(seen)} requests during 9 restarts, {len(failures(seen))} lost", end=" ")
    assert failures(seen) == []
    assert len(seen) > 200


def test_one_dead_one_hung_and_one_draining_cost_nothing(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever runs containers ends those whose liveness probe fails; until then a hung one holds what it was given."""

    async def probe(replica: Replica) -> float:
        """Ends a replica whose probe fails three times in a row. Returns after how long that was."""
        started, failed = time.monotonic(), 0
        while failed < LIVENESS_TRIES:
            await asyncio.sleep(1)
            failed = 0 if await asyncio.to_thread(replica.answers, "live") else failed + 1
        replica.kill()
        return time.monotonic() - started

    async def scenario(url: str, backends: list[Replica]) -> tuple[list[Seen], Seen, float]:
        dead, hung, draining = backends[:3]
        async with client(url) as http, client(draining.url) as direct:
            long = asyncio.ensure_future(ask(direct, chat("Stay.", max_tokens=1500)))
            async with load(http) as seen:
                await asyncio.sleep(1)
                dead.kill()
                draining.signal(signal.SIGTERM)
                hung.signal(signal.SIGSTOP)
                held = await probe(hung)
                await asyncio.sleep(3)
                assert not draining.answers("ready"), "it is to drain all the time"
            return seen, await long, held

    with replicas(tiny_checkpoint, tmp_path, 6) as backends, nginx(tmp_path, backends) as url:
        seen, long, held = asyncio.run(scenario(url, backends))
    plain = [one for number, one in enumerate(seen) if number % 3]
    with capsys.disabled():
        print(
            f"\n{len(plain)} requests, {len(failures(plain))} lost; the hung one was ended after {held:.1f} s; ", end=""
        )
        print(f"the slowest took {max(one.total for one in plain):.1f} s", end=" ")
    assert failures(plain) == []
    assert long.finished
    assert len(plain) > 50
