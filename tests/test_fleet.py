"""Several engines behind one API, in threads, without a model: they share the load, and each dies for itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from server.errors import EngineDeadError
from server.types import ANYBODY, EngineRequest
from tests.factories import make_request
from tests.llm_server import Server, collect, run, until, words
from tests.test_llm_restart import Engines


class Two:
    """Two lines of engines."""

    def __init__(self, **limits: int) -> None:
        self.lines = [Engines(**limits), Engines(**limits)]

    def play(self, scenario: Callable[[Server], Awaitable[None]], **settings: object) -> None:
        async def wrapped(server: Server) -> None:
            try:
                await scenario(server)
            finally:
                for line in self.lines:
                    line.may_start.set()  # else the server could not be closed

        run(Server(cores=[line.make for line in self.lines], **settings), wrapped)  # type: ignore[arg-type]

    def taken(self, index: int) -> set[str]:
        """Ids that the engines of a line were given."""
        return {
            new.request_id
            for executor in self.lines[index].executors
            for step in executor.steps
            for new in step.new_requests
        }


def text_of(outputs: list) -> str:  # type: ignore[type-arg]
    return "".join(output.text for output in outputs)


def stranger(number: int, **settings: object) -> EngineRequest:
    return make_request(range(1000 * number, 1000 * number + 12), **settings)  # type: ignore[arg-type]


def test_requests_are_shared_among_engines_and_all_are_answered() -> None:
    two = Two()

    async def scenario(server: Server) -> None:
        requests = [stranger(number, max_tokens=20) for number in range(8)]
        answers = await asyncio.gather(*(collect(server.llm, request) for request in requests))
        assert [text_of(outputs) for outputs in answers] == [words(request) for request in requests]
        assert [len(two.taken(index)) for index in (0, 1)] == [4, 4]

    two.play(scenario)


def test_a_second_turn_goes_to_the_engine_that_has_the_first() -> None:
    two = Two()

    async def scenario(server: Server) -> None:
        await collect(server.llm, stranger(1, tiles=["a"]))
        await collect(server.llm, stranger(2, tiles=["b"]))
        turns = [stranger(number, tiles=[name]) for number, name in ((3, "b"), (4, "a"), (5, "b"))]
        for turn in turns:
            await collect(server.llm, turn)
        homes = [[turn.request_id in two.taken(index) for index in (0, 1)] for turn in turns]
        assert homes[0] == homes[2] != homes[1]

    two.play(scenario)


def test_the_death_of_an_engine_costs_its_own_streams_and_no_others() -> None:
    two = Two(max_num_seqs=1)

    async def scenario(server: Server) -> None:
        mine, other = stranger(1, max_tokens=100), stranger(2, max_tokens=60)
        dying, staying = server.llm.generate(mine), asyncio.ensure_future(collect(server.llm, other))
        await anext(dying)
        waiting = [stranger(number, max_tokens=3) for number in range(3, 7)]
        waits = [asyncio.ensure_future(collect(server.llm, request)) for request in waiting]
        await until(lambda: server.llm.num_in_flight == 6)
        assert mine.request_id in two.taken(0)
        two.lines[0].kill()
        with pytest.raises(EngineDeadError):
            async for _ in dying:
                pass
        # The engine that died is not back: the other one has answered what was waiting for both.
        assert text_of(await staying) == words(other)
        answers = await asyncio.gather(*waits)
        assert [text_of(outputs) for outputs in answers] == [words(request) for request in waiting]
        assert len(two.lines[0].cores) == 1

    two.play(scenario)


def test_while_one_is_down_the_other_takes_what_comes_and_then_they_share_again() -> None:
    two = Two()

    async def scenario(server: Server) -> None:
        two.lines[0].kill()
        dies = asyncio.ensure_future(collect(server.llm, stranger(0, max_tokens=90)))
        await until(lambda: server.llm._fleet.num_up == 1)
        server.llm.check_capacity(ANYBODY)
        assert server.llm.is_ready
        requests = [stranger(number) for number in range(1, 5)]
        await asyncio.gather(*(collect(server.llm, request) for request in requests))
        assert {request.request_id for request in requests} <= two.taken(1)
        assert text_of(await dies)
        two.lines[0].may_start.set()
        await until(lambda: server.llm._fleet.num_up == 2)
        late = [stranger(number, max_tokens=30) for number in range(11, 15)]
        await asyncio.gather(*(collect(server.llm, request) for request in late))
        assert len(two.taken(0) & {request.request_id for request in late}) == 2

    two.play(scenario)


def test_without_any_engine_requests_are_refused_and_what_waits_gets_the_first_that_is_back() -> None:
    two = Two(max_num_seqs=1)

    async def scenario(server: Server) -> None:
        begun = [asyncio.ensure_future(collect(server.llm, stranger(n, max_tokens=100))) for n in (1, 2)]
        await until(lambda: all(line.executors[0].num_steps > 3 for line in two.lines))
        waiting = stranger(3)
        waits = asyncio.ensure_future(collect(server.llm, waiting))
        await until(lambda: server.llm.num_in_flight == 3)
        for line in two.lines:
            line.kill()
        for task in begun:
            with pytest.raises(EngineDeadError):
                await task
        await until(lambda: server.llm._fleet.num_up == 0)
        assert not server.llm.is_ready
        with pytest.raises(EngineDeadError, match="is being restarted"):
            server.llm.check_capacity(ANYBODY)
        two.lines[1].may_start.set()
        assert text_of(await waits) == words(waiting)
        server.llm.check_capacity(ANYBODY)

    two.play(scenario)


def test_a_server_lives_as_long_as_one_of_its_engines() -> None:
    two = Two()

    async def scenario(server: Server) -> None:
        for line in two.lines:
            line.may_start.set()
        two.lines[0].kill()
        moved = stranger(0, max_tokens=50)
        assert text_of(await collect(server.llm, moved)) == words(moved)
        await until(lambda: server.llm._fleet.num_up == 1)
        assert server.llm.is_alive
        assert text_of(await collect(server.llm, stranger(1))) == words(stranger(1))
        two.lines[1].kill()
        dies = asyncio.ensure_future(collect(server.llm, stranger(2, max_tokens=100)))
        await until(lambda: not server.llm.is_alive)
        with pytest.raises(EngineDeadError):
            await dies

    two.play(scenario, max_engine_restarts=0)


def test_what_is_told_of_engines_is_the_sum() -> None:
    two = Two(max_num_seqs=1)

    async def scenario(server: Server) -> None:
        tasks = [asyncio.ensure_future(collect(server.llm, stranger(number, max_tokens=90))) for number in range(6)]

        def told(name: str) -> float:
            page = server.llm.metrics.render()[0].decode()
            (line,) = [line for line in page.splitlines() if line.startswith(f"idefics2:{name}{{")]
            return float(line.rpartition(" ")[2])

        await until(lambda: told("num_requests_running") == 2 and told("num_requests_waiting") == 4)
        assert told("engine_up") == 2
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: told("num_requests_running") == told("num_requests_waiting") == 0)

    two.play(scenario)
