"""Sends request bodies: a closed loop keeps N in flight, an open loop sends at given times whatever comes back.

Knows when to send and what to count; what is in the bodies is the workload's business.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from server.bench.client import Response, StreamClient
from server.bench.stream import RequestRecord, StreamReader, error_message

T = TypeVar("T")
Arrival = Literal["poisson", "constant"]
OnDone = Callable[[RequestRecord], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """How to send: either `concurrency` requests are kept in flight (a closed loop) or `request_rate` of them leave
    each second (an open one); the other is None.

    `max_concurrency` caps an open loop; requests past it wait at the client, which the report shows. `timeout` is the
    longest silence of a request in seconds. `arrival_seed` is that of the Poisson process.
    """

    concurrency: int | None = None
    request_rate: float | None = None
    arrival: Arrival = "poisson"
    max_concurrency: int | None = None
    arrival_seed: int = 0
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.request_rate is None):
            raise ValueError("a load has either a concurrency or a request rate")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """What came of a run. Records are in the order of the bodies.

    `duration` is in seconds from the first request sent to the last one ended; `client_cpu` is the CPU time in seconds
    that this process spent meanwhile.
    """

    records: list[RequestRecord]
    warmup: list[RequestRecord]
    duration: float
    peak_in_flight: int
    client_cpu: float


class WarmupError(Exception):
    """Every warm-up request failed, so the run was not begun."""


class Sender:
    """Sends one body at a time for whoever calls, and counts what is in flight. Never raises for a failed request."""

    def __init__(self, client: StreamClient, on_done: OnDone | None = None) -> None:
        self.peak_in_flight = 0
        self._in_flight = 0
        self._client = client
        self._on_done = on_done

    async def send(self, index: int, body: bytes, *, due: float | None = None) -> RequestRecord:
        """Send and wait for the end of the stream. A failure of any kind is the record's `error`."""
        start = time.perf_counter()
        record = RequestRecord(index=index, due=start if due is None else due, start=start)
        reader = StreamReader(record)
        self._in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self._in_flight)
        try:
            response = await self._client.post(body, reader)
            if response.status != 200:
                record.error = describe_refusal(response)
        except OSError as error:
            record.error = record.error or f"{type(error).__name__}: {error}"
        finally:
            self._in_flight -= 1
            record.end = time.perf_counter()
        reader.close()
        if self._on_done is not None:
            self._on_done(record)
        return record


def describe_refusal(response: Response) -> str:
    """`HTTP 429: queue is full` from an answer other than 200."""
    text = response.body.decode("utf-8", "replace")
    try:
        message = error_message(json.loads(text))
    except ValueError:
        message = error_message(text)
    return f"HTTP {response.status}: {message}" if message else f"HTTP {response.status}"


def arrival_offsets(*, rate: float, count: int, arrival: Arrival, seed: int) -> list[float]:
    """Seconds after the start at which each of `count` requests is due; the first is due at once.

    Poisson gaps are stretched so that the last request is due at exactly (count - 1) / rate: a Poisson process given
    its number of arrivals. A short run then offers the rate that was asked for and only the clustering is random.
    """
    if rate <= 0:
        raise ValueError(f"the request rate must be above 0, not {rate}")
    if arrival == "constant" or count < 2:
        return [index / rate for index in range(count)]
    generator = random.Random(f"{seed}/arrivals")
    times = [0.0, *itertools.accumulate(generator.expovariate(1.0) for _ in range(count - 1))]
    stretch = (count - 1) / rate / times[-1]
    return [moment * stretch for moment in times]


async def closed_loop(sender: Sender, bodies: Sequence[bytes], *, concurrency: int) -> list[RequestRecord]:
    """Keep `concurrency` requests in flight until all are sent: the next goes out when one ends."""
    queue = iter(enumerate(bodies))
    records: list[RequestRecord] = []

    async def user() -> None:
        for index, body in queue:  # shared: each user takes the next body that nobody has taken
            records.append(await sender.send(index, body))

    async with asyncio.TaskGroup() as users:
        for _ in range(min(concurrency, len(bodies))):
            users.create_task(user())
    return sorted(records, key=lambda record: record.index)


async def open_loop(
    sender: Sender,
    bodies: Sequence[bytes],
    *,
    offsets: Sequence[float],
    max_concurrency: int | None = None,
) -> list[RequestRecord]:
    """Send body i at `offsets[i]` seconds from now, however many are still running, up to `max_concurrency`."""
    slots = asyncio.Semaphore(max_concurrency or len(bodies) or 1)
    origin = time.perf_counter()

    async def one(index: int, due: float) -> RequestRecord:
        async with slots:
            return await sender.send(index, bodies[index], due=due)

    tasks: list[asyncio.Task[RequestRecord]] = []
    async with asyncio.TaskGroup() as group:
        for index, offset in enumerate(offsets):
            if (wait := origin + offset - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            tasks.append(group.create_task(one(index, origin + offset)))
    return [task.result() for task in tasks]


async def run_load(
    plan: LoadPlan,
    *,
    url: str,
    headers: Mapping[str, str],
    bodies: Sequence[bytes],
    warmup: Sequence[bytes] = (),
    on_done: OnDone | None = None,
) -> LoadResult:
    """Warm up, then measure. `on_done` is called for each measured request as it ends.

    Raises WarmupError when all warm-up requests fail: the measured ones would too.
    """
    async with StreamClient(url, headers=headers, timeout=plan.timeout) as client:
        at_once = plan.concurrency or plan.max_concurrency or len(warmup)
        warm = await closed_loop(Sender(client), warmup, concurrency=at_once)
        if warm and all(record.error for record in warm):
            raise WarmupError(f"all {len(warm)} warm-up requests failed, the first with: {warm[0].error}")
        sender = Sender(client, on_done)
        # A collection in the middle of a burst of events would look like a stall of the server. What lives by now
        # lives to the end of the run, so it need not be looked at again.
        gc.collect()
        gc.freeze()
        cpu = time.process_time()
        try:
            records = await _measured(plan, sender, bodies)
        finally:
            cpu = time.process_time() - cpu
            gc.unfreeze()
    duration = max(record.end for record in records) - min(record.start for record in records) if records else 0.0
    return LoadResult(
        records=records, warmup=warm, duration=duration, peak_in_flight=sender.peak_in_flight, client_cpu=cpu
    )


def _measured(plan: LoadPlan, sender: Sender, bodies: Sequence[bytes]) -> Awaitable[list[RequestRecord]]:
    if plan.concurrency is not None:
        return closed_loop(sender, bodies, concurrency=plan.concurrency)
    if plan.request_rate is None:
        raise ValueError("a plan has a concurrency or a request rate")
    offsets = arrival_offsets(rate=plan.request_rate, count=len(bodies), arrival=plan.arrival, seed=plan.arrival_seed)
    return open_loop(sender, bodies, offsets=offsets, max_concurrency=plan.max_concurrency)


def run_fast(main: Coroutine[Any, Any, T]) -> T:
    """Run on uvloop where there is one: a third of the cost of an event."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with suppress(ImportError):
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)
