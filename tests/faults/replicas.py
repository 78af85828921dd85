"""Several servers behind a real nginx: restarted in turn, dead, hung and leaving; and alike in what they say."""

from __future__ import annotations

import asyncio
import math
import os
import random
import shutil
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import httpx

from tests.faults.bench import (
    CHAT,
    Row,
    Seen,
    Workbench,
    ask,
    chat,
    clients,
    end_group,
    median,
    milliseconds,
    quantile,
)
from tests.faults.nginx import NGINX, Nginx, running_nginx
from tests.serving import Server, free_port

PLACES = ("--max-num-seqs", "8", "--num-threads", "1")
START_SECONDS = 300.0

RATE = 8.0  # requests a second, half of them streams: what three servers and their clients can do on two cores
ROUNDS = 3

TROUBLE_SECONDS = 12.0
READ_TIMEOUT = 8.0  # longer than any answer of this scenario takes, so that silence means a server that hangs
NUM_AWAY = 3

NUM_PROMPTS = 20
NUM_QUEUED = 4


class Replica:
    """A server that can be started again on its port."""

    def __init__(self, bench: Workbench, name: str, *flags: str) -> None:
        self._bench = bench
        self._name = name
        self._flags = flags
        self.port = free_port()
        self.start()

    def start(self) -> None:
        self.server: Server = self._bench.start(*self._flags, name=self._name, port=self.port)

    async def until_ready(self) -> None:
        async with asyncio.timeout(START_SECONDS), clients(self.server) as http:
            while not await _is_ready(http):
                assert self.server.process.poll() is None, self.server.log.read_text()
                await asyncio.sleep(0.1)

    async def leave(self) -> int:
        """SIGTERM; the exit status."""
        self.server.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.server.process.wait, 120)

    def signal_all(self, number: signal.Signals) -> None:
        """To the server and all that it has started."""
        os.killpg(self.server.process.pid, number)


async def _is_ready(http: httpx.AsyncClient) -> bool:
    try:
        return (await http.get("/health/ready")).status_code == 200
    except httpx.TransportError:
        return False


@asynccontextmanager
async def _replicas(bench: Workbench, count: int, *flags: str) -> AsyncIterator[list[Replica]]:
    found: list[Replica] = []
    try:
        for index in range(count):
            found.append(Replica(bench, f"replica-{index}", *flags))
        await asyncio.gather(*(replica.until_ready() for replica in found))
        yield found
    finally:
        for replica in found:
            end_group(replica.server)


def _needs_nginx(scenario: Callable[[Workbench], Awaitable[list[Row]]]) -> Callable[[Workbench], Awaitable[list[Row]]]:
    async def run(bench: Workbench) -> list[Row]:
        if shutil.which(NGINX) is None:
            return [Row("nginx", f"installed as {NGINX}", "not found, so nothing was tried", ok=False)]
        return await scenario(bench)

    return run


# -- restarts --------------------------------------------------------------------------------------------------------


@_needs_nginx
async def rolling_restart(bench: Workbench) -> list[Row]:
    """Three replicas under an open load, each in turn told to leave and started again, three times over."""
    statuses: list[int] = []
    away: list[float] = []
    starting: list[float] = []
    async with _replicas(bench, 3, *PLACES) as found:
        with running_nginx(bench.folder, [replica.port for replica in found], tries=2, read_timeout=600) as nginx:
            is_over = asyncio.Event()
            load = asyncio.create_task(_mixed_load(nginx, is_over))
            await asyncio.sleep(2)
            for replica in found * ROUNDS:
                signalled = time.perf_counter()
                statuses.append(await replica.leave())
                gone = time.perf_counter()
                replica.start()
                await replica.until_ready()
                away.append(gone - signalled)
                starting.append(time.perf_counter() - gone)
            is_over.set()
            whole, streams, seconds = await load
            passed_on = nginx.num_passed_on()
    return [
        *_judge_load(whole, streams, seconds, passed_on),
        Row("exit statuses", f"{3 * ROUNDS} times 0", str(statuses), statuses == [0] * 3 * ROUNDS),
        Row(
            "a restart",
            "a time",
            f"{median(away):.1f} s to leave (at most {max(away):.1f}), {median(starting):.1f} s until ready again "
            f"(at most {max(starting):.1f})",
            len(away) == 3 * ROUNDS,
        ),
    ]


Tries = list[Seen]  # of one request, at most two


async def _mixed_load(nginx: Nginx, is_over: asyncio.Event) -> tuple[list[Tries], list[Tries], float]:
    """Requests in Poisson's order until it is over: those not streamed, those streamed, and for how many seconds."""
    chance = random.Random(0)
    tasks: tuple[list[asyncio.Task[Tries]], list[asyncio.Task[Tries]]] = ([], [])
    began = time.perf_counter()
    async with clients(nginx.base_url) as http:
        while not is_over.is_set():
            stream = chance.random() < 0.5
            body = chat(f"Number {len(tasks[0])}.", max_tokens=chance.randint(4, 12), stream=stream)
            tasks[stream].append(asyncio.create_task(_ask_twice(http, body)))
            await asyncio.sleep(chance.expovariate(RATE))
        seconds = time.perf_counter() - began
        whole, streams = [list(await asyncio.gather(*each)) for each in tasks]
    return whole, streams, seconds


async def _ask_twice(http: httpx.AsyncClient, body: dict[str, object]) -> Tries:
    """Once more if nothing has come of it; a stream that has begun cannot be asked for again."""
    tries = [await ask(http, body)]
    if not tries[0].finished and math.isnan(tries[0].first if tries[0].status == 200 else math.nan):
        tries.append(await ask(http, body))
    return tries


def _judge_load(whole: Sequence[Tries], streams: Sequence[Tries], seconds: float, passed_on: int) -> list[Row]:
    sent = len(whole) + len(streams)
    failed = [tries[-1].error for tries in whole if not tries[-1].finished]
    retried = sum(len(tries) > 1 for tries in (*whole, *streams))
    cut = [tries[-1].error for tries in streams if not tries[-1].finished and not math.isnan(tries[-1].first)]
    lost = sum(not tries[-1].finished for tries in (*whole, *streams))
    return [
        Row(
            f"{len(whole)} requests not streamed, of {sent} at {RATE:g}/s in {seconds:.0f} s",
            "no failure, with at most one retry by the client",
            f"{len(failed)} failed {failed or ''}; {retried} of all {sent} retried by their client, {passed_on} passed "
            "on to another replica by nginx",
            not failed and bool(whole),
        ),
        Row(f"{len(streams)} streams", "none cut", f"{len(cut)} cut {cut or ''}", not cut and bool(streams)),
        Row("requests lost", "none", str(lost), lost == 0),
    ]


# -- trouble ---------------------------------------------------------------------------------------------------------


@_needs_nginx
async def one_dead_one_hung(bench: Workbench) -> list[Row]:
    """Of five replicas one is killed, one stopped, one leaving: nginx knows of none of it, and has to find out."""
    async with _replicas(bench, NUM_AWAY + 2, *PLACES, "--shutdown-timeout", "300") as found:
        dead, hung, leaving, *_ = found
        ports = [replica.port for replica in found]
        async with _kept_busy(leaving.server):
            dead.server.process.kill()
            await asyncio.to_thread(dead.server.process.wait)
            hung.signal_all(signal.SIGSTOP)
            leaving.server.process.send_signal(signal.SIGTERM)
            rows = []
            for tries in (NUM_AWAY + 1, 2):
                with running_nginx(bench.folder, ports, tries=tries, read_timeout=READ_TIMEOUT) as nginx:
                    seen = await _steady_load(nginx, retry=tries == 2)
                    rows.append(_judge_trouble(seen, tries, nginx.num_passed_on()))
            async with clients(leaving.server) as http:
                status = (await http.get("/health/live")).status_code
            rows.append(Row("the leaving one all that time", "alive", str(status), status == 200))
    return rows


@asynccontextmanager
async def _kept_busy(server: Server) -> AsyncIterator[None]:
    """By a stream that does not end before the block does."""
    async with clients(server) as http:
        busy = Seen()
        task = asyncio.create_task(ask(http, chat("Go on.", max_tokens=30_000, stream=True), seen=busy))
        while math.isnan(busy.first):
            await asyncio.sleep(0.01)
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _steady_load(nginx: Nginx, *, retry: bool) -> list[Tries]:
    """Requests that are not streamed."""
    tasks = []
    async with clients(nginx.base_url) as http:
        for index in range(int(TROUBLE_SECONDS * RATE)):
            body = chat(f"Number {index}.", max_tokens=4)
            tasks.append(asyncio.create_task(_ask_twice(http, body) if retry else _ask_once(http, body)))
            await asyncio.sleep(1 / RATE)
        return list(await asyncio.gather(*tasks))


async def _ask_once(http: httpx.AsyncClient, body: dict[str, object]) -> Tries:
    return [await ask(http, body)]


def _judge_trouble(seen: list[Tries], tries: int, passed_on: int) -> Row:
    answered = sum(each[-1].finished for each in seen)
    failed = [f"{each[-1].status} {each[-1].error}" for each in seen if not each[-1].finished]
    retried = sum(len(each) > 1 for each in seen)
    seconds = [sum(one.total for one in each) for each in seen]
    return Row(
        f"1 dead, 1 hung, 1 leaving, 2 well; {len(seen)} requests not streamed, at {RATE:g}/s; nginx tries {tries}, "
        f"waits {READ_TIMEOUT:g} s for an answer",
        f"all answered, with {'one retry' if tries == 2 else 'no retry'} by the client",
        f"{answered} answered {failed or ''}, {retried} retried by their client, {passed_on} passed on by nginx; "
        f"median {milliseconds(median(seconds))}, 90th percentile {milliseconds(quantile(seconds, 0.9))}, "
        f"longest {max(seconds):.1f} s",
        answered == len(seen),
    )


# -- alike -----------------------------------------------------------------------------------------------------------


async def same_seed(bench: Workbench) -> list[Row]:
    """Two replicas say the same for the same seed, and one answers for the other what that has not begun."""
    async with _replicas(bench, 2, "--max-num-seqs", "1", "--num-threads", "1") as found:
        here, there = [await _sampled(replica.server) for replica in found]
        same = sum(one == other for one, other in zip(here, there, strict=True))
        rows = [
            Row(
                f"{NUM_PROMPTS} prompts at temperature 1, each with a seed",
                "the same tokens of both replicas, others for each prompt",
                f"{same} the same, {len(set(here))} different prompts' answers",
                same == len(set(here)) == NUM_PROMPTS,
            )
        ]
        if shutil.which(NGINX) is None:
            return [*rows, Row("nginx", f"installed as {NGINX}", "not found, so no failover was tried", ok=False)]
        with running_nginx(bench.folder, [replica.port for replica in found], tries=2, read_timeout=600) as nginx:
            rows += await _fail_over(nginx, *(replica.server for replica in found))
    return rows


async def _sampled(server: Server) -> list[tuple[int, ...]]:
    answers = []
    async with clients(server) as http:
        for index in range(NUM_PROMPTS):
            body = chat(f"Tell me about {index}.", max_tokens=24, temperature=1, seed=index, return_token_ids=True)
            answer = (await http.post(CHAT, json=body)).json()
            answers.append(tuple(answer["choices"][0]["token_ids"]))
    return answers


async def _fail_over(nginx: Nginx, first: Server, second: Server) -> list[Row]:
    """Requests wait at both, behind one that runs; one of both is killed."""
    before = await asyncio.to_thread(second.metric, "requests_total")
    async with clients(first) as at_first, clients(second) as at_second, clients(nginx.base_url) as http:
        running = [
            asyncio.create_task(ask(at, chat("Take your time.", max_tokens=400, stream=True)))
            for at in (at_first, at_second)
        ]
        await _until(lambda: sum(server.metric("num_requests_running") for server in (first, second)) == 2)
        queued = [
            asyncio.create_task(ask(http, chat(f"Next, {index}.", max_tokens=8, stream=index % 2 == 0)))
            for index in range(NUM_QUEUED)
        ]
        await _until(lambda: sum(_waiting(server) for server in (first, second)) == NUM_QUEUED)
        num_moved = _waiting(first)
        first.process.kill()
        seen = await asyncio.gather(*queued)
        cut, whole = await asyncio.gather(*running)
        await _until(lambda: second.metric("num_requests_running") == 0)
        counted = await asyncio.to_thread(second.metric, "requests_total") - before
    answered = sum(one.finished for one in seen)
    return [
        Row(
            f"{NUM_QUEUED} requests that wait at two replicas, of which one is killed",
            "all answered, those of the dead one by the other, unknown to their clients",
            f"{answered} answered; {num_moved:g} waited at the dead one, {nginx.num_passed_on()} passed on by nginx",
            answered == NUM_QUEUED and num_moved == nginx.num_passed_on() > 0,
        ),
        Row(
            "what the other one has computed",
            f"{NUM_QUEUED} requests and the one that ran there",
            f"{counted:g}",
            counted == NUM_QUEUED + 1 and whole.finished,
        ),
        Row("the stream of the dead one", "broken off, which its client sees", cut.error or "nothing", bool(cut.error)),
    ]


def _waiting(server: Server) -> float:
    return server.metric("num_requests_waiting")


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not await asyncio.to_thread(condition):
            await asyncio.sleep(0.05)
