"""What clients see when the engine of a real server dies or hangs.

Most of it against an engine that computes nothing and is there again within a second; then with a model.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import pytest

from tests import faulty_engine
from tests.faults.bench import Seen, ask, chat, clients, gather, status_field
from tests.faulty_engine import BREAKS, HANGS, KILLS, SPIN_SECONDS, SPINS, START_FILE
from tests.serving import SMALL, Server, running_server

STALL_SECONDS = 2.0
WAIT_SECONDS = 60.0
LONG = 1900  # tokens, each of 5 ms or more
CHECKS = ("live", "ready", "startup")


class Faulty:
    """A server with a faulty engine, and a say in what becomes of engines that start."""

    def __init__(self, server: Server, start: Path) -> None:
        self.server = server
        self._start = start

    def let_engines(self, what: str) -> None:
        """From now on they "wait", "fail" or "crash" at their start, or start ("")."""
        self._start.write_text(what)

    def restarts(self, reason: str) -> float:
        return self.server.metric("engine_restarts_total", f'reason="{reason}"')

    @asynccontextmanager
    async def no_engine(self, http: httpx.AsyncClient) -> AsyncIterator[None]:
        """Inside, the engine is dead and the next one has not started."""
        self.let_engines("wait")
        os.kill(self.server.engine_pid, signal.SIGKILL)
        await until(http, "ready", 503)
        try:
            yield
        finally:
            self.let_engines("")


@contextmanager
def faulty_server(checkpoint: Path, folder: Path, *flags: str) -> Iterator[Faulty]:
    start = folder / "start"
    start.write_text("")
    flags = ("--max-num-seqs", "2", "--engine-stall-seconds", str(STALL_SECONDS), *flags)
    environment = {START_FILE: str(start)}
    module = faulty_engine.__name__
    with running_server(checkpoint, folder / "log", *flags, module=module, **environment) as server:
        yield Faulty(server, start)


@pytest.fixture(scope="module")
def shared(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    with faulty_server(tiny_checkpoint, tmp_path_factory.mktemp("faulty"), "--max-engine-restarts", "100") as made:
        yield made


@pytest.fixture
def faulty(shared: Faulty) -> Faulty:
    """The shared server, with an engine."""

    async def until_ready() -> None:
        async with clients(shared.server) as http:
            await until(http, "ready", 200)

    asyncio.run(until_ready())
    return shared


async def until(http: httpx.AsyncClient, check: str, status: int) -> httpx.Response:
    """Ask a health check until it says so."""
    async with asyncio.timeout(WAIT_SECONDS):
        while (answer := await http.get(f"/health/{check}")).status_code != status:
            await asyncio.sleep(0.02)
    return answer


async def health(http: httpx.AsyncClient) -> tuple[int, ...]:
    """Statuses of CHECKS."""
    return tuple([(await http.get(f"/health/{check}")).status_code for check in CHECKS])


async def until_here(http: httpx.AsyncClient, count: int) -> None:
    """Wait until the server has so many requests."""
    async with asyncio.timeout(WAIT_SECONDS):
        while (await http.get("/load")).json()["server_load"] != count:
            await asyncio.sleep(0.02)


async def until_generating(server: Server) -> None:
    """Wait until two answers have begun."""
    before = await asyncio.to_thread(server.metric, "generation_tokens_total")
    async with asyncio.timeout(WAIT_SECONDS):
        while (
            await asyncio.to_thread(server.metric, "num_requests_running") < 2
            or await asyncio.to_thread(server.metric, "generation_tokens_total") < before + 20
        ):
            await asyncio.sleep(0.02)


def begin(*work: object) -> list[asyncio.Task[Seen]]:
    return [asyncio.ensure_future(item) for item in work]  # type: ignore[call-overload]


def short(name: str, **fields: object) -> dict[str, object]:
    return chat(f"Tell of {name}.", max_tokens=12, **fields)


NAMES = ["bread", "salt", "wine", "oil"]


async def lose_engine_under_load(server: Server, number: signal.Signals) -> None:
    """Two answers have begun, one of them streamed, and four wait, two of them to be streamed."""
    async with clients(server) as http:
        alone = await gather(*(ask(http, short(name)) for name in NAMES))
        engine = server.engine_pid
        begun = begin(ask(http, chat(max_tokens=LONG, stream=True)), ask(http, chat(max_tokens=LONG)))
        await until_generating(server)
        queued = begin(*(ask(http, short(name, stream=index % 2 == 0)) for index, name in enumerate(NAMES)))
        await until_here(http, 6)
        os.kill(engine, number)
        stream, plain = await asyncio.gather(*begun)
        assert (stream.status, stream.error, stream.finished) == (200, "engine_unavailable", False)
        assert stream.text
        assert (plain.status, plain.error) == (503, "engine_unavailable")
        assert 1 <= int(plain.retry_after) <= 120
        answers = await asyncio.gather(*queued)
        assert [(answer.text, answer.status, answer.error) for answer in answers] == [
            (answer.text, 200, "") for answer in alone
        ]
        assert all(answer.finished for answer in answers)
        assert await health(http) == (200, 200, 200)
        assert server.engine_pid != engine
        assert server.process.poll() is None
        await asyncio.to_thread(server.wait_until_idle)


@pytest.mark.parametrize(("number", "cause"), [(signal.SIGKILL, "died"), (signal.SIGSTOP, "hung")])
def test_what_had_begun_ends_and_what_had_not_is_answered(faulty: Faulty, number: signal.Signals, cause: str) -> None:
    before = faulty.restarts(cause)
    asyncio.run(lose_engine_under_load(faulty.server, number))
    assert faulty.restarts(cause) == before + 1
    assert faulty.server.metric("engine_up") == 1


def test_between_two_engines_new_requests_are_refused_and_those_that_wait_may_leave(faulty: Faulty) -> None:
    async def scenario() -> None:
        async with clients(faulty.server) as http:
            begun = begin(ask(http, chat(max_tokens=LONG, stream=True)), ask(http, chat(max_tokens=LONG, stream=True)))
            await until_generating(faulty.server)
            stays, leaves = begin(ask(http, short("salt")), ask(http, short("wine", stream=True)))
            hurries = begin(ask(http, short("oil"), headers={"x-request-timeout": "5"}))
            await until_here(http, 5)
            async with faulty.no_engine(http):
                assert {seen.error for seen in await asyncio.gather(*begun)} == {"engine_unavailable"}
                assert await health(http) == (200, 503, 200)
                ready = await http.get("/health/ready")
                assert ready.json()["error"]["code"] == "engine_restarting"
                refused = await ask(http, short("bread"))
                assert (refused.status, refused.error) == (503, "engine_restarting")
                assert 1 <= int(refused.retry_after) <= 120
                assert faulty.server.metric("engine_up") == 0
                leaves.cancel()
                (late,) = await asyncio.gather(*hurries)
                assert (late.status, late.error) == (408, "request_timeout")
                await until_here(http, 1)
            assert (await stays).finished
            await asyncio.to_thread(faulty.server.wait_until_idle)

    asyncio.run(scenario())
    assert faulty.server.metric("admission_rejections_total", 'reason="restarting"') >= 1


def test_a_request_that_kills_engines_kills_two(faulty: Faulty) -> None:
    """Those that wait outlive both; there are places for two, so one of them may have been computed beside it."""
    before = faulty.restarts("died")

    async def scenario() -> list[Seen]:
        async with clients(faulty.server) as http:
            begun = begin(ask(http, chat(max_tokens=LONG)), ask(http, chat(max_tokens=LONG)))
            await until_generating(faulty.server)
            queued = begin(ask(http, short("poison", seed=KILLS)))
            await until_here(http, 3)
            queued += begin(*(ask(http, short(name)) for name in NAMES))
            await until_here(http, 7)
            os.kill(faulty.server.engine_pid, signal.SIGKILL)
            await asyncio.gather(*begun)
            return await asyncio.gather(*queued)

    poison, *others = asyncio.run(scenario())
    assert (poison.status, poison.error) == (500, "internal_error")
    assert sum(seen.finished for seen in others) >= len(NAMES) - 1
    assert faulty.restarts("died") == before + 3


def test_a_request_that_hangs_engines_hangs_two(faulty: Faulty) -> None:
    before = faulty.restarts("hung")

    async def scenario() -> Seen:
        async with clients(faulty.server) as http:
            return await ask(http, short("poison", seed=HANGS))

    seen = asyncio.run(scenario())
    assert (seen.status, seen.error) == (500, "internal_error")
    assert faulty.restarts("hung") == before + 2


def test_an_engine_that_knows_it_is_broken_says_so_and_ends(faulty: Faulty) -> None:
    async def scenario() -> Seen:
        async with clients(faulty.server) as http:
            return await ask(http, short("poison", seed=BREAKS))

    assert asyncio.run(scenario()).status == 500
    log = faulty.server.log.read_text()
    assert "the engine is broken and ends: a device that is lost" in log
    assert "the engine died: it exited with 70" in log
    assert "Traceback" not in log


def test_a_step_that_takes_long_is_no_hang(faulty: Faulty) -> None:
    assert SPIN_SECONDS > 2 * STALL_SECONDS
    before = faulty.restarts("hung")

    async def scenario() -> Seen:
        async with clients(faulty.server) as http:
            return await ask(http, short("patience", seed=SPINS))

    assert asyncio.run(scenario()).finished
    assert faulty.restarts("hung") == before


def test_a_server_that_was_stopped_goes_on_with_the_same_engine(faulty: Faulty) -> None:
    """Its engine waits for it: nothing piles up, and nobody takes the other for hung."""
    server = faulty.server

    async def scenario() -> Seen:
        engine = server.engine_pid
        async with clients(server) as http:
            (stream,) = begin(ask(http, chat(max_tokens=LONG, stream=True)))
            await until_here(http, 1)
            os.kill(server.process.pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(1)
                before = status_field(engine, "VmRSS")
                await asyncio.sleep(STALL_SECONDS + 1)
                assert status_field(engine, "VmRSS") - before < 4096, "KiB"
            finally:
                os.kill(server.process.pid, signal.SIGCONT)
            seen = await stream
        assert server.engine_pid == engine
        return seen

    assert asyncio.run(scenario()).finished


def test_a_server_that_has_given_up_says_so_and_stays(tiny_checkpoint: Path, tmp_path: Path) -> None:
    async def scenario(faulty: Faulty) -> None:
        async with clients(faulty.server) as http:
            assert await health(http) == (200, 200, 200)
            begun = begin(ask(http, chat(max_tokens=LONG)), ask(http, chat(max_tokens=LONG)))
            await until_generating(faulty.server)
            (queued,) = begin(ask(http, short("salt")))
            await until_here(http, 3)
            faulty.let_engines("fail")
            os.kill(faulty.server.engine_pid, signal.SIGKILL)
            for seen in await asyncio.gather(*begun, queued):
                assert (seen.status, seen.error) == (503, "engine_unavailable")
            assert await health(http) == (503, 503, 200)
            assert (await ask(http, short("salt"))).error == "engine_unavailable"

    with faulty_server(tiny_checkpoint, tmp_path, "--max-engine-restarts", "1") as faulty:
        asyncio.run(scenario(faulty))
        log = faulty.server.log.read_text()
        assert "cannot be started again: the model is not there any more" in log
        assert "no engine any more: 2 lost within 600 s, the limit is 1 restarts" in log
        assert faulty.server.stop() == 0


async def drain_while_restarting(server: Server) -> Seen:
    """What a client sees that waits for an engine which comes too late."""
    async with clients(server) as http:
        begun = begin(ask(http, chat(max_tokens=LONG)), ask(http, chat(max_tokens=LONG)))
        await until_generating(server)
        (queued,) = begin(ask(http, short("salt")))
        await until_here(http, 3)
        os.kill(server.engine_pid, signal.SIGKILL)
        await asyncio.gather(*begun)
        server.process.terminate()
        return await queued


def test_with_a_model_answers_are_as_before_and_a_restart_does_not_keep_a_server_from_leaving(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    flags = (*SMALL, "--max-num-seqs", "2", "--shutdown-timeout", "0.5")
    with running_server(tiny_checkpoint, tmp_path / "log", *flags) as server:
        asyncio.run(lose_engine_under_load(server, signal.SIGKILL))
        seen = asyncio.run(drain_while_restarting(server))
        assert (seen.status, seen.error) == (503, "server_shutting_down")
        assert server.process.wait(30) == 0
