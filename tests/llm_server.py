"""An AsyncLLM over a real engine loop in a thread, with an executor that needs no model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import cast

from server.admission import Admission
from server.config import ServerConfig
from server.engine.client import EngineClient, ThreadClient
from server.engine.core import EngineCore
from server.engine.step import ModelRunnerOutput, SchedulerOutput
from server.engine.supervisor import EngineSupervisor
from server.llm import AsyncLLM
from server.observability.metrics import ServerMetrics
from server.outputs.detokenizer import TokenTable
from server.outputs.processor import OutputProcessor
from server.types import ChatInput, EngineRequest, RequestOutput, SamplingParams, TextPart, Turn
from tests.factories import FakeExecutor, expected_answer, make_core, make_request

CHAT = ChatInput(request_id="r", turns=(Turn("user", (TextPart("x"),)),), sampling=SamplingParams())
# FakeExecutor samples 1000 to 66535; each is a word of its own.
TABLE = TokenTable([b"</s>" if index == 2 else f" w{index}".encode() for index in range(66536)], frozenset({2}))


class GatedExecutor(FakeExecutor):
    """Runs a step only when the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        self.entered.release()
        assert self.gate.acquire(timeout=20)
        return super().execute(step)


class FakeInputs:
    """Hands out prepared requests; `closing` runs while it closes."""

    def __init__(self) -> None:
        self.num_tokens = 8
        self.is_healthy = True
        self.failure: Exception | None = None
        self.gate: asyncio.Event | None = None
        self.closing: Callable[[], Awaitable[None]] | None = None
        self.max_model_lens: list[int] = []
        self.log: list[str] = []

    async def start(self) -> None:
        self.log.append("start")

    async def close(self) -> None:
        self.log.append("close")
        if self.closing is not None:
            await self.closing()

    async def process(self, chat: ChatInput, *, max_model_len: int, admit: Callable[[int], None]) -> EngineRequest:
        self.max_model_lens.append(max_model_len)
        admit(self.num_tokens)
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        return make_request(self.num_tokens, origin=chat.origin)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does; the time limit is the scenario's."""
    while not condition():
        await asyncio.sleep(0.005)


class Server:
    """An AsyncLLM with its parts at hand. Its engine is not restarted, unless `cores` makes one each time.

    Several in `cores` make as many engines.
    """

    def __init__(
        self,
        *,
        executor: FakeExecutor | None = None,
        client: EngineClient | None = None,
        cores: Callable[[], EngineCore] | Sequence[Callable[[], EngineCore]] | None = None,
        limits: dict[str, int] | None = None,
        **settings: object,
    ) -> None:
        self.core = make_core(**(limits or {}))
        if executor is not None:
            self.core.executor = executor
        self.executor = cast(FakeExecutor, self.core.executor)
        self.inputs = FakeInputs()
        metrics = ServerMetrics("test")
        self.outputs = OutputProcessor(TABLE, metrics)
        config = ServerConfig(**settings)  # type: ignore[arg-type]
        makers: list[Callable[[], EngineClient]] = [
            (lambda make=make: ThreadClient(make)) for make in ([cores] if callable(cores) else cores or [])
        ] or [lambda: client or ThreadClient(lambda: self.core)]
        self.llm = AsyncLLM(
            admission=Admission(
                max_in_flight=config.max_num_seqs + config.max_num_queued_reqs,
                max_queued_tokens=config.max_num_queued_tokens,
            ),
            engines=[
                EngineSupervisor(
                    make_client,
                    stall_seconds=config.engine_stall_seconds,
                    max_restarts=config.max_engine_restarts if cores else 0,
                )
                for make_client in makers
            ],
            inputs=self.inputs,  # type: ignore[arg-type]
            outputs=self.outputs,
            metrics=metrics,
            model_names=("test",),
            model_root="test",
            vocab_size=66536,
            fingerprint="f",
        )

    async def until_idle(self) -> None:
        """Wait until the engine holds nothing, as it must soon after the last request."""
        scheduler = self.core.scheduler
        await until(lambda: not scheduler.has_work and scheduler.holds_nothing)

    async def until_entered(self) -> None:
        """Wait until a gated step has begun."""
        assert isinstance(self.executor, GatedExecutor)
        assert await asyncio.to_thread(self.executor.entered.acquire, timeout=10)


def run(server: Server, scenario: Callable[[Server], Awaitable[None]], *, start: bool = True) -> None:
    """Play a scenario against a started server; a wait without end is a failure."""

    async def play() -> None:
        async with asyncio.timeout(20):
            if start:
                await server.llm.start()
            try:
                await scenario(server)
            finally:
                if isinstance(server.executor, GatedExecutor):
                    server.executor.gate.release(10_000)
                await server.llm.close()

    asyncio.run(play())


def words(request: EngineRequest) -> str:
    return " ".join(f"w{token}" for token in expected_answer(request))


async def collect(llm: AsyncLLM, request: EngineRequest) -> list[RequestOutput]:
    return [output async for output in llm.generate(request)]
