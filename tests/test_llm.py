"""The facade between HTTP and the engine: a real engine loop in a thread, with an executor that needs no model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from server.engine.client import ThreadClient, ToRunning
from server.engine.core import AbortRequests, EngineCore, EngineInfo
from server.engine.step import ModelRunnerOutput, SchedulerOutput
from server.errors import (
    CapacityError,
    ClientError,
    ConfigError,
    EngineDeadError,
    RequestFailedError,
    ServerError,
    UnavailableError,
)
from server.types import ANYBODY, FinishReason, RequestOutput
from tests.factories import FakeExecutor, expected_answer, make_core, make_request
from tests.llm_server import CHAT, GatedExecutor, Server, collect, run, until, words

# -- answers --------------------------------------------------------------------------------------------------------


def test_an_answer_arrives_whole_and_ends_once() -> None:
    async def scenario(server: Server) -> None:
        request = make_request(8, max_tokens=20)
        outputs = await collect(server.llm, request)
        assert "".join(output.text for output in outputs) == words(request)
        assert [token for output in outputs for token in output.token_ids] == expected_answer(request)
        assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
        assert outputs[-1].finish_reason is FinishReason.LENGTH
        assert outputs[-1].usage.completion_tokens == 20
        assert len(server.outputs) == 0

    run(Server(), scenario)


def test_several_answers_and_prompts_are_one_response() -> None:
    async def scenario(server: Server) -> None:
        requests = [make_request(range(9), max_tokens=4, n=3), make_request(range(40, 60), max_tokens=6)]
        texts = ["", "", "", ""]
        async for output in server.llm.generate(*requests):
            texts[output.index] += output.text
            usage = output.usage
        assert texts == [words(requests[0])] * 3 + [words(requests[1])]
        assert (usage.prompt_tokens, usage.completion_tokens) == (29, 18)
        assert len(server.outputs) == 0
        await server.until_idle()

    run(Server(), scenario)


def test_many_answers_at_once_do_not_crowd_out_those_that_are_here() -> None:
    async def scenario(server: Server) -> None:
        running = server.llm.generate(make_request(8, max_tokens=110))
        await anext(running)
        with pytest.raises(CapacityError, match="the limit is 4"):
            await anext(server.llm.generate(make_request(8, n=4)))
        assert len(server.outputs) == 1
        fits = server.llm.generate(make_request(8, n=3, max_tokens=2))
        assert [output.index async for output in fits if output.finish_reason] == [0, 1, 2]
        await running.aclose()  # type: ignore[attr-defined]
        await server.until_idle()
        alone = server.llm.generate(make_request(8, n=6, max_tokens=2))
        assert len([output async for output in alone if output.finish_reason]) == 6, "who is alone is in nobody's way"

    run(Server(max_num_seqs=2, max_num_queued_reqs=2), scenario)


def test_leaving_a_response_cancels_all_its_answers() -> None:
    async def scenario(server: Server) -> None:
        outputs = server.llm.generate(make_request(8, max_tokens=110, n=3), make_request(9, max_tokens=110))
        async for _ in outputs:
            break
        await outputs.aclose()  # type: ignore[attr-defined]
        assert len(server.outputs) == 0
        await server.until_idle()

    run(Server(), scenario)


def test_many_at_once_get_their_own_answers() -> None:
    async def scenario(server: Server) -> None:
        requests = [make_request(range(i, i + 9), tiles=["a"] * (i % 3), max_tokens=5 + i) for i in range(30)]
        answers = await asyncio.gather(*(collect(server.llm, request) for request in requests))
        for request, outputs in zip(requests, answers, strict=True):
            assert "".join(output.text for output in outputs) == words(request)
        await server.until_idle()

    run(Server(), scenario)


def test_text_arrives_while_the_answer_is_made() -> None:
    async def scenario(server: Server) -> None:
        assert isinstance(server.executor, GatedExecutor)
        request = make_request(8, max_tokens=3)
        outputs = server.llm.generate(request)
        for token in expected_answer(request):
            server.executor.gate.release()
            output = await anext(outputs)
            assert output.token_ids == [token]
        assert output.finish_reason is FinishReason.LENGTH
        with pytest.raises(StopAsyncIteration):
            await anext(outputs)

    run(Server(executor=GatedExecutor()), scenario)


def test_a_slow_reader_gets_everything_in_one_piece() -> None:
    async def scenario(server: Server) -> None:
        assert isinstance(server.executor, GatedExecutor)
        request = make_request(8, max_tokens=30)
        outputs = server.llm.generate(request)
        server.executor.gate.release()
        first = await anext(outputs)
        server.executor.gate.release(29)
        await server.until_idle()
        await asyncio.sleep(0.05)  # for the loop to take what the engine's thread handed over
        second = await anext(outputs)
        assert (first.token_ids, second.token_ids) == (expected_answer(request)[:1], expected_answer(request)[1:])
        assert second.finish_reason is FinishReason.LENGTH

    run(Server(executor=GatedExecutor()), scenario)


def test_a_stop_string_ends_the_answer_and_the_work() -> None:
    async def scenario(server: Server) -> None:
        assert isinstance(server.executor, GatedExecutor)
        answer = expected_answer(make_request(8, max_tokens=110))
        server.executor.gate.release(3)
        outputs = await collect(server.llm, make_request(8, max_tokens=110, stop=(f"w{answer[2]}",)))
        assert "".join(output.text for output in outputs) == f"w{answer[0]} w{answer[1]} "
        assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == (FinishReason.STOP, f"w{answer[2]}")
        server.executor.gate.release(1000)
        await server.until_idle()
        assert len(server.executor.steps) <= 5

    run(Server(executor=GatedExecutor()), scenario)


def test_a_stop_string_ends_the_work_even_while_nobody_reads() -> None:
    async def scenario(server: Server) -> None:
        assert isinstance(server.executor, GatedExecutor)
        answer = expected_answer(make_request(8, max_tokens=110))
        outputs = server.llm.generate(make_request(8, max_tokens=110, stop=(f"w{answer[2]}",)))
        server.executor.gate.release()
        await anext(outputs)
        server.executor.gate.release(2)
        (stream,) = server.outputs._streams.values()
        await until(lambda: stream.finish_reason is not None)
        server.executor.gate.release(1000)
        await server.until_idle()
        assert len(server.executor.steps) <= 6
        assert (await anext(outputs)).finish_reason is FinishReason.STOP

    run(Server(executor=GatedExecutor()), scenario)


# -- leaving early --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "cancel"])
@pytest.mark.parametrize("when", ["before the first token", "in the middle"])
def test_whoever_leaves_early_gives_everything_back(how: str, when: str) -> None:
    async def scenario(server: Server) -> None:
        assert isinstance(server.executor, GatedExecutor)
        request = make_request(8, tiles=["a"], max_tokens=100)
        outputs = server.llm.generate(request)
        if when == "in the middle":
            server.executor.gate.release(3)
            await anext(outputs)
        if how == "cancel":
            task = asyncio.ensure_future(drain(outputs))
            await server.until_entered()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            task = asyncio.ensure_future(anext(outputs)) if when == "before the first token" else None
            await server.until_entered()
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            await outputs.aclose()  # type: ignore[attr-defined]
        assert len(server.outputs) == 0
        assert server.llm.num_in_flight == 0
        server.executor.gate.release(10_000)
        await server.until_idle()
        assert len(server.executor.steps) < 50
        assert b'requests_total{finish_reason="abort",model_name="test"} 1.0' in server.llm.metrics.render()[0]

    run(Server(executor=GatedExecutor()), scenario)


async def drain(outputs: AsyncIterator[RequestOutput]) -> None:
    async for _ in outputs:
        pass


def test_leaving_touches_nobody_else() -> None:
    async def scenario(server: Server) -> None:
        stays, leaves = make_request(8, max_tokens=60), make_request(range(300, 308), max_tokens=100)
        staying = asyncio.ensure_future(collect(server.llm, stays))
        leaving = server.llm.generate(leaves)
        await anext(leaving)
        await leaving.aclose()  # type: ignore[attr-defined]
        assert "".join(output.text for output in await staying) == words(stays)

    run(Server(), scenario)


class CountingClient(ThreadClient):
    """Notes every abort."""

    def __init__(self, factory: Callable[[], EngineCore]) -> None:
        super().__init__(factory)
        self.aborts: list[str] = []

    def submit(self, message: ToRunning) -> None:
        if isinstance(message, AbortRequests):
            self.aborts += message.request_ids
        super().submit(message)


def test_an_answer_that_ended_in_the_engine_is_not_aborted() -> None:
    client = CountingClient(make_core)

    async def scenario(server: Server) -> None:
        await collect(server.llm, make_request(8, max_tokens=3))
        with pytest.raises(RequestFailedError):
            await collect(server.llm, make_request(500))
        assert client.aborts == []

    run(Server(client=client), scenario)


# -- capacity -------------------------------------------------------------------------------------------------------


def test_beyond_its_capacity_a_server_says_try_later() -> None:
    async def scenario(server: Server) -> None:
        assert isinstance(server.executor, GatedExecutor)
        streams = [server.llm.generate(make_request(8, max_tokens=9)) for _ in range(3)]
        tasks = []
        for number, stream in enumerate(streams):
            server.llm.check_capacity(ANYBODY)
            assert server.llm.num_in_flight == number
            tasks.append(asyncio.ensure_future(drain(stream)))
            await asyncio.sleep(0)
        with pytest.raises(CapacityError, match="3 requests are running or waiting, the limit is 3") as caught:
            server.llm.check_capacity(ANYBODY)
        assert caught.value.status == 429
        assert caught.value.retry_after is not None
        assert 1.0 <= caught.value.retry_after <= 60.0
        server.executor.gate.release(10_000)
        await asyncio.gather(*tasks)
        server.llm.check_capacity(ANYBODY)

    run(Server(executor=GatedExecutor(), max_num_seqs=1, max_num_queued_reqs=2), scenario)


def test_requests_in_preparation_count() -> None:
    async def scenario(server: Server) -> None:
        server.inputs.gate = asyncio.Event()
        preparing = [asyncio.ensure_future(server.llm.prepare(CHAT)) for _ in range(2)]
        await asyncio.sleep(0)
        assert server.llm.num_in_flight == 2
        with pytest.raises(CapacityError):
            server.llm.check_capacity(ANYBODY)
        server.inputs.failure = ClientError("no")
        preparing[0].cancel()
        server.inputs.gate.set()
        await asyncio.gather(*preparing, return_exceptions=True)
        assert server.llm.num_in_flight == 0
        server.llm.check_capacity(ANYBODY)

    run(Server(max_num_seqs=1, max_num_queued_reqs=1), scenario)


def test_capacity_holds_although_bodies_take_time_to_arrive() -> None:
    """All look at an empty server, then read their bodies, and only then are they prepared."""

    async def scenario(server: Server) -> None:
        assert isinstance(server.executor, GatedExecutor)

        async def one_request() -> None:
            server.llm.check_capacity(ANYBODY)
            await asyncio.sleep(0.01)
            await drain(server.llm.generate(await server.llm.prepare(CHAT)))

        tasks = [asyncio.ensure_future(one_request()) for _ in range(20)]
        await asyncio.sleep(0.1)
        in_flight = server.llm.num_in_flight
        server.executor.gate.release(10_000)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert in_flight == 3
        assert sum(isinstance(result, CapacityError) for result in results) == 17

    run(Server(executor=GatedExecutor(), max_num_seqs=1, max_num_queued_reqs=2), scenario)


def test_preparing_asks_for_the_engines_own_context() -> None:
    async def scenario(server: Server) -> None:
        await server.llm.prepare(CHAT)
        assert server.inputs.max_model_lens == [server.llm.max_model_len] == [96]

    run(Server(limits={"max_model_len": 96}), scenario)


# -- starting and stopping ------------------------------------------------------------------------------------------


def test_before_it_has_started_a_server_is_loading() -> None:
    async def scenario(server: Server) -> None:
        assert not server.llm.is_ready
        assert server.llm.is_alive
        with pytest.raises(UnavailableError, match="loading") as caught:
            server.llm.check_capacity(ANYBODY)
        assert (caught.value.code, caught.value.status) == ("model_loading", 503)
        with pytest.raises(UnavailableError, match="loading"):
            await server.llm.prepare(CHAT)
        info = await server.llm.start()
        assert isinstance(info, EngineInfo)
        assert server.llm.is_ready
        server.llm.check_capacity(ANYBODY)
        assert server.inputs.log == ["start"]

    run(Server(), scenario, start=False)


def failing_factory() -> EngineCore:
    raise ConfigError("max_model_len 99 is more than fits")


def test_an_engine_that_cannot_start_says_why() -> None:
    async def scenario(server: Server) -> None:
        with pytest.raises(ConfigError, match="max_model_len 99"):
            await server.llm.start()
        assert not server.llm.is_ready

    run(Server(client=ThreadClient(failing_factory)), scenario, start=False)


def test_closing_ends_what_is_open_with_an_error() -> None:
    async def scenario(server: Server) -> None:
        assert isinstance(server.executor, GatedExecutor)
        task = asyncio.ensure_future(collect(server.llm, make_request(8, max_tokens=100)))
        await server.until_entered()
        server.executor.gate.release(10_000)
        await server.llm.close()
        with pytest.raises(UnavailableError, match="shutting down"):
            await task
        assert not server.llm.is_ready
        with pytest.raises(UnavailableError, match="shutting down"):
            server.llm.check_capacity(ANYBODY)
        with pytest.raises(ServerError):
            await collect(server.llm, make_request(8))
        assert server.inputs.log == ["start", "close"]

    run(Server(executor=GatedExecutor()), scenario)


def test_a_request_that_was_in_preparation_when_the_server_closed_ends() -> None:
    async def scenario(server: Server) -> None:
        late: list[asyncio.Future[list[RequestOutput]]] = []

        async def begin() -> None:
            late.append(asyncio.ensure_future(collect(server.llm, make_request(8, max_tokens=110))))
            await asyncio.sleep(0)

        server.inputs.closing = begin
        await server.llm.close()
        server.inputs.closing = None
        async with asyncio.timeout(0.5):
            with pytest.raises(UnavailableError):
                await late[0]

    run(Server(), scenario)


def test_a_server_that_drains_finishes_what_it_has_and_takes_nothing_new() -> None:
    async def scenario(server: Server) -> None:
        assert isinstance(server.executor, GatedExecutor)
        accepted = await server.llm.prepare(CHAT)
        running = make_request(8, max_tokens=5)
        task = asyncio.ensure_future(collect(server.llm, running))
        await server.until_entered()
        server.llm.drain()
        assert not server.llm.is_ready
        assert server.llm.is_alive
        with pytest.raises(UnavailableError, match="shutting down"):
            server.llm.check_capacity(ANYBODY)
        server.executor.gate.release(1000)
        assert "".join(output.text for output in await task) == words(running)
        assert (await collect(server.llm, accepted))[-1].finish_reason is FinishReason.LENGTH

    run(Server(executor=GatedExecutor()), scenario)


def test_a_server_that_ends_all_fails_what_is_open_and_frees_the_engine() -> None:
    async def scenario(server: Server) -> None:
        assert isinstance(server.executor, GatedExecutor)
        task = asyncio.ensure_future(collect(server.llm, make_request(8, max_tokens=100)))
        await server.until_entered()
        server.llm.end_all()
        with pytest.raises(UnavailableError, match="shutting down"):
            await task
        with pytest.raises(UnavailableError, match="shutting down"):
            await collect(server.llm, make_request(8))
        server.executor.gate.release(1000)
        await server.until_idle()
        assert len(server.executor.steps) < 50

    run(Server(executor=GatedExecutor()), scenario)


# -- failures -------------------------------------------------------------------------------------------------------


def test_a_step_that_breaks_fails_its_requests_and_the_server_lives() -> None:
    async def scenario(server: Server) -> None:
        poison = make_request(8, max_tokens=50)
        server.executor.explode_on = {poison.request_id}
        with pytest.raises(RequestFailedError):
            await collect(server.llm, poison)
        assert server.llm.is_alive
        after = make_request(8, max_tokens=5)
        assert "".join(output.text for output in await collect(server.llm, after)) == words(after)

    run(Server(), scenario)


def test_a_request_that_the_engine_refuses_fails_and_does_not_hang() -> None:
    async def scenario(server: Server) -> None:
        with pytest.raises(RequestFailedError, match="refused"):
            await collect(server.llm, make_request(500))
        assert server.llm.is_alive

    run(Server(), scenario)


class MortalExecutor(FakeExecutor):
    """After some steps it breaks where nothing catches it: the engine dies."""

    def __init__(self, core: EngineCore, steps: int) -> None:
        super().__init__()
        self._core = core
        self._left = steps

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        if self._left == 0:
            self._core.scheduler.fail_step = self._die  # type: ignore[method-assign]
            raise RuntimeError("first")
        self._left -= 1
        return super().execute(step)

    def _die(self, *args: object) -> list[object]:
        raise RuntimeError("engine death")


def mortal_server(steps: int) -> Server:
    server = Server()
    server.core.executor = MortalExecutor(server.core, steps)
    return server


def test_when_the_engine_dies_text_comes_first_and_then_the_error() -> None:
    async def scenario(server: Server) -> None:
        request = make_request(8, max_tokens=50)
        texts: list[str] = []

        async def read() -> None:
            async for output in server.llm.generate(request):
                texts.append(output.text)
                assert output.finish_reason is None

        with pytest.raises(EngineDeadError) as caught:
            await read()
        assert caught.value.status == 503
        assert "".join(texts) == " ".join(f"w{token}" for token in expected_answer(request)[:3])

    run(mortal_server(3), scenario)


def test_when_the_engine_dies_all_fail_and_nobody_hangs() -> None:
    async def scenario(server: Server) -> None:
        tasks = [asyncio.ensure_future(collect(server.llm, make_request(8, max_tokens=50))) for _ in range(12)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(result) for result in results} == {EngineDeadError}
        assert not server.llm.is_alive
        assert not server.llm.is_ready
        with pytest.raises(EngineDeadError):
            server.llm.check_capacity(ANYBODY)
        assert server.llm.num_in_flight == 0

    run(mortal_server(2), scenario)


class DyingClient:
    """An engine that is gone, while its process or thread still counts as alive: messages go nowhere."""

    def __init__(self) -> None:
        self.on_death: Callable[[], None] | None = None

    def start(self, on_outputs: object, on_death: Callable[[], None], *, timeout: float | None = None) -> EngineInfo:
        self.on_death = on_death
        return make_core().info

    def submit(self, message: ToRunning) -> None:
        """Take it, as a queue does whose reader has left."""

    def cpu_seconds(self) -> float | None:
        return None

    def resident_bytes(self) -> int:
        return 0

    def kill(self) -> bool:
        return False

    def close(self) -> str:
        return "it is gone"


def test_a_request_that_was_in_preparation_when_the_engine_died_fails() -> None:
    client = DyingClient()

    async def scenario(server: Server) -> None:
        request = await server.llm.prepare(CHAT)
        assert client.on_death is not None
        client.on_death()
        await until(lambda: not server.llm.is_alive)
        async with asyncio.timeout(0.5):
            with pytest.raises(EngineDeadError):
                await collect(server.llm, request)

    run(Server(client=client), scenario)


def test_an_open_stream_fails_when_the_engine_is_gone() -> None:
    client = DyingClient()

    async def scenario(server: Server) -> None:
        task = asyncio.ensure_future(collect(server.llm, make_request(8)))
        await asyncio.sleep(0.01)
        assert client.on_death is not None
        client.on_death()
        with pytest.raises(EngineDeadError):
            await task

    run(Server(client=client), scenario)


def test_a_conversation_that_cannot_be_prepared_reaches_no_engine() -> None:
    async def scenario(server: Server) -> None:
        server.inputs.failure = ClientError("too long")
        with pytest.raises(ClientError, match="too long"):
            await server.llm.prepare(CHAT)
        assert server.llm.num_in_flight == 0
        assert not server.core.scheduler.has_work

    run(Server(), scenario)


def test_without_workers_for_pictures_it_is_not_ready_and_yet_takes_texts() -> None:
    async def scenario(server: Server) -> None:
        server.inputs.is_healthy = False
        assert not server.llm.is_ready
        assert await collect(server.llm, await server.llm.prepare(CHAT))
        server.inputs.is_healthy = True
        assert server.llm.is_ready

    run(Server(), scenario)
