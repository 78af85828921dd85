"""What becomes of requests when their engine dies and another follows, in one process: engines in threads, no model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from server.engine.core import EngineCore
from server.engine.step import ModelRunnerOutput, SchedulerOutput
from server.errors import DeadlineError, EngineBrokenError, EngineDeadError, RequestFailedError, UnavailableError
from server.types import ANYBODY, RequestOrigin
from tests.factories import FakeExecutor, make_core, make_request
from tests.llm_server import CHAT, Server, collect, run, until, words


class Mortal(FakeExecutor):
    """Dies when told to, or when it meets what `kills` it."""

    def __init__(self, kills: set[str]) -> None:
        super().__init__()
        self.kills = kills
        self.dies = threading.Event()
        self.num_steps = 0

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        self.num_steps += 1
        if self.dies.wait(0.002) or any(item.request_id in self.kills for item in step.scheduled):
            raise EngineBrokenError("told to")
        return super().execute(step)


class Engines:
    """Makes engines, one after the other; all but the first wait until they may start."""

    def __init__(self, **limits: int) -> None:
        self.executors: list[Mortal] = []
        self.cores: list[EngineCore] = []
        self.kills: set[str] = set()
        self.may_start = threading.Event()
        self._limits = limits

    def make(self) -> EngineCore:
        if self.cores:
            assert self.may_start.wait(20)
        core = make_core(**self._limits)
        core.executor = Mortal(self.kills)
        self.executors.append(core.executor)
        self.cores.append(core)
        return core

    def kill(self) -> None:
        self.executors[-1].dies.set()


def server_of(engines: Engines, **settings: object) -> Server:
    return Server(cores=engines.make, **settings)  # type: ignore[arg-type]


async def until_down(server: Server) -> None:
    await until(lambda: not server.llm.is_ready)


def play(engines: Engines, scenario: Callable[[Server], object], **settings: object) -> None:
    try:
        run(server_of(engines, **settings), scenario)  # type: ignore[arg-type]
    finally:
        engines.may_start.set()


def test_what_waited_is_answered_in_order_and_what_had_begun_ends() -> None:
    engines = Engines(max_num_seqs=1)

    async def scenario(server: Server) -> None:
        begun = server.llm.generate(make_request(8, max_tokens=100))
        await anext(begun)
        requests = [make_request(range(i, i + 9), max_tokens=3) for i in range(6)]
        waiting = [asyncio.ensure_future(collect(server.llm, request)) for request in requests]
        await until(lambda: server.llm.num_in_flight == 7)
        engines.kill()
        with pytest.raises(EngineDeadError) as caught:
            async for _ in begun:
                pass
        assert caught.value.status == 503
        assert not any(task.done() for task in waiting)
        engines.may_start.set()
        answers = await asyncio.gather(*waiting)
        assert ["".join(output.text for output in outputs) for outputs in answers] == [words(r) for r in requests]
        new = [item.request_id for step in engines.executors[1].steps for item in step.new_requests]
        assert new == [request.request_id for request in requests]

    play(engines, scenario)


def test_a_request_that_was_prepared_before_is_answered_and_one_that_comes_after_is_refused() -> None:
    engines = Engines()

    async def scenario(server: Server) -> None:
        prepared = await server.llm.prepare(CHAT)
        dies = asyncio.ensure_future(collect(server.llm, make_request(8, max_tokens=100)))
        await until(lambda: engines.executors[0].num_steps > 2)
        engines.kill()
        await until_down(server)
        assert server.llm.is_alive
        assert server.llm.has_started
        late = asyncio.ensure_future(collect(server.llm, prepared))
        with pytest.raises(EngineDeadError, match="is being restarted") as caught:
            server.llm.check_capacity(ANYBODY)
        assert (caught.value.code, caught.value.status) == ("engine_restarting", 503)
        with pytest.raises(EngineDeadError, match="is being restarted"):
            await server.llm.prepare(CHAT)
        engines.may_start.set()
        assert "".join(output.text for output in await late) == words(prepared)
        with pytest.raises(EngineDeadError):
            await dies
        server.llm.check_capacity(ANYBODY)

    play(engines, scenario)


def test_who_leaves_or_is_late_between_two_engines_reaches_neither() -> None:
    engines = Engines()

    async def scenario(server: Server) -> None:
        prepared = [await server.llm.prepare(CHAT) for _ in range(2)]
        hurried = make_request(8, origin=RequestOrigin(deadline=asyncio.get_running_loop().time() + 0.2))
        dies = asyncio.ensure_future(collect(server.llm, make_request(8, max_tokens=100)))
        await until(lambda: engines.executors[0].num_steps > 2)
        engines.kill()
        await until_down(server)
        leaves, stays = (asyncio.ensure_future(collect(server.llm, request)) for request in prepared)
        with pytest.raises(DeadlineError):
            await collect(server.llm, hurried)
        leaves.cancel()
        await asyncio.gather(leaves, dies, return_exceptions=True)
        engines.may_start.set()
        await stays
        assert [item.request_id for step in engines.executors[1].steps for item in step.new_requests] == [
            prepared[1].request_id
        ]
        assert server.llm.num_in_flight == 0

    play(engines, scenario)


def test_all_answers_of_a_response_end_when_one_of_them_had_begun() -> None:
    engines = Engines(max_num_seqs=1)

    async def scenario(server: Server) -> None:
        response = server.llm.generate(make_request(8, max_tokens=100, n=3), make_request(9, max_tokens=3))
        await anext(response)
        engines.may_start.set()
        engines.kill()
        with pytest.raises(EngineDeadError):
            async for _ in response:
                pass
        await until(lambda: server.llm.is_ready)
        after = make_request(8, max_tokens=3)
        assert "".join(output.text for output in await collect(server.llm, after)) == words(after)

    play(engines, scenario)


@pytest.mark.parametrize("n", [1, 3])
def test_what_kills_an_engine_gets_one_more_and_those_that_only_wait_get_all(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.supervisor.MAX_PAUSE_SECONDS", 0.01)
    engines = Engines(max_num_seqs=1)
    engines.may_start.set()

    async def scenario(server: Server) -> None:
        poison = [make_request(8, n=n, max_tokens=3) for _ in range(2)]
        engines.kills = {request.request_id for request in poison}
        engines.executors[0].kills = engines.kills
        waiting = make_request(8, max_tokens=3)
        results = await asyncio.gather(
            *(collect(server.llm, request) for request in (*poison, waiting)), return_exceptions=True
        )
        for result in results[:2]:
            assert isinstance(result, RequestFailedError), result
            assert result.status == 500
        assert not isinstance(results[2], BaseException)
        assert "".join(output.text for output in results[2]) == words(waiting)
        assert len(engines.cores) == 5

    play(engines, scenario, max_engine_restarts=10)


def test_closing_between_two_engines_ends_what_waits() -> None:
    engines = Engines()

    async def scenario(server: Server) -> None:
        prepared = await server.llm.prepare(CHAT)
        dies = asyncio.ensure_future(collect(server.llm, make_request(8, max_tokens=100)))
        await until(lambda: engines.executors[0].num_steps > 2)
        engines.kill()
        await until_down(server)
        late = asyncio.ensure_future(collect(server.llm, prepared))
        await asyncio.sleep(0)
        server.llm.end_all()
        with pytest.raises(UnavailableError, match="shutting down"):
            await late
        with pytest.raises(EngineDeadError):
            await dies
        engines.may_start.set()

    play(engines, scenario)


def test_metrics_tell_of_restarts() -> None:
    engines = Engines()

    async def scenario(server: Server) -> None:
        def told() -> str:
            return server.llm.metrics.render()[0].decode()

        assert 'idefics2:engine_up{model_name="test"} 1.0' in told()
        dies = asyncio.ensure_future(collect(server.llm, make_request(8, max_tokens=100)))
        await until(lambda: engines.executors[0].num_steps > 2)
        engines.kill()
        await until_down(server)
        assert 'idefics2:engine_up{model_name="test"} 0.0' in told()
        assert 'idefics2:num_requests_running{model_name="test"} 0.0' in told()
        engines.may_start.set()
        await until(lambda: server.llm.is_ready)
        assert 'idefics2:engine_restarts_total{model_name="test",reason="died"} 1.0' in told()
        assert 'idefics2:engine_restarts_total{model_name="test",reason="hung"} 0.0' in told()
        await asyncio.gather(dies, return_exceptions=True)

    play(engines, scenario)
