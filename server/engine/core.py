"""The engine's loop: drain messages, plan a step, run it, hand the results over as one batch.

Runs in a thread or a process of its own; knows neither. Blocks on its inbox when there is nothing to do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import msgspec

from server.engine.scheduler import Scheduler
from server.engine.step import StepExecutor
from server.errors import EngineBrokenError
from server.types import EngineOutput, EngineOutputs, EngineRequest, FinishReason

logger = logging.getLogger(__name__)

MAX_LOST_STEPS = 3


class AbortRequests(msgspec.Struct, frozen=True, tag="abort"):
    """End requests without a further output."""

    request_ids: list[str]


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Say something."""


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Leave the loop after this message."""


class EngineInfo(msgspec.Struct, frozen=True, tag="ready", kw_only=True):
    """What the engine turned out to be, said once when it is ready. `longest_step_seconds` is of its warm-up."""

    max_model_len: int
    num_blocks: int
    block_size: int
    num_tile_slots: int
    device: str
    dtype: str
    num_parameters: int
    load_seconds: float
    longest_step_seconds: float = 0.0


class EngineFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine could not start; `message` is one line for the operator."""

    message: str


@dataclass(frozen=True)
class Prepared:
    """A request's grammar is compiled, or cannot be; from a thread of the executor's, never from outside."""

    request_id: str
    failure: str | None


ToEngine = EngineRequest | AbortRequests | Ping | Shutdown
FromEngine = EngineOutputs | EngineInfo | EngineFailed


class EngineCore:
    """A scheduler and a runner, stepped together. Messages go into `inbox`, from any thread."""

    def __init__(self, scheduler: Scheduler, executor: StepExecutor, info: EngineInfo) -> None:
        self.scheduler = scheduler
        self.executor = executor
        self.info = info
        self.inbox: SimpleQueue[ToEngine | Prepared] = SimpleQueue()
        self._num_lost_steps = 0
        self._emit: Callable[[EngineOutputs], None] | None = None  # while it runs

    def handle(self, message: ToEngine | Prepared) -> EngineOutput | None:
        """Take one message other than Shutdown; an output only when a request is refused."""
        if isinstance(message, EngineRequest):
            try:
                self._add(message)
            except ValueError as error:
                # The input processor checks all of this first; whatever slips through must not end the loop.
                logger.error("refused request %s: %s", message.request_id, error)
                return EngineOutput(
                    request_id=message.request_id,
                    new_token_ids=[],
                    finish_reason=FinishReason.ERROR,
                    error="the engine refused this request",
                )
        elif isinstance(message, AbortRequests):
            self.scheduler.abort(message.request_ids)
        elif isinstance(message, Prepared):
            if message.failure is not None:
                return self.scheduler.refuse(message.request_id, message.failure)
            self.scheduler.release(message.request_id)
        return None

    def _add(self, request: EngineRequest) -> None:
        if request.sampling.grammar is None:
            self.scheduler.add(request)
            return
        # Compiling takes as long as a step or more, so it must not be part of one.
        self.scheduler.add(request, held=True)
        self._announce([request.request_id])
        self.executor.prepare(request, lambda failure: self.inbox.put(Prepared(request.request_id, failure)))

    def step(self) -> EngineOutputs:
        """Run one step. A failure that nobody can be found for ends the requests of this step and no others.

        Raises EngineBrokenError when no later step can succeed.
        """
        started = time.perf_counter()
        plan = self.scheduler.schedule()
        self._announce([new.request_id for new in plan.new_requests])
        encode_seconds = 0.0
        try:
            result = self.executor.execute(plan)
        except EngineBrokenError:
            raise
        except Exception:
            logger.exception("a step with %d requests failed", len(plan.request_ids))
            outputs = self.scheduler.fail_step(plan, "the engine failed while computing this request")
            self._note_crashes(len(plan.request_ids), of=len(plan.request_ids))
        else:
            outputs = self.scheduler.update(plan, result)
            encode_seconds = result.encode_seconds
            self._note_crashes(len(result.crashed), of=len(plan.request_ids))
        stats = self.scheduler.take_stats(step_seconds=time.perf_counter() - started, encode_seconds=encode_seconds)
        return EngineOutputs(outputs=outputs, stats=stats)

    def _announce(self, answer_ids: list[str]) -> None:
        """Tell of work before it begins, as it may be the last that is heard of this engine."""
        if answer_ids and self._emit is not None:
            self._emit(EngineOutputs(outputs=[], stats=self.scheduler.take_stats(), started=answer_ids))

    def _note_crashes(self, num_crashed: int, *, of: int) -> None:
        """Raise EngineBrokenError when step after step was lost whole.

        One request alone tells nothing: it may be its own fault, as often as its client sends it again.
        """
        if num_crashed < of:
            self._num_lost_steps = 0
        elif of > 1:
            self._num_lost_steps += 1
        if self._num_lost_steps == MAX_LOST_STEPS:
            raise EngineBrokenError(f"{MAX_LOST_STEPS} steps of several requests failed whole, and none succeeded")

    def run(self, emit: Callable[[EngineOutputs], None]) -> None:
        """Serve until Shutdown. `emit` is called at least once a step, and after messages where there is none to run.

        Raises EngineBrokenError.
        """
        self._emit = emit
        while True:
            refused = []
            for message in self._drain():
                if isinstance(message, Shutdown):
                    return
                output = self.handle(message)
                if output is not None:
                    refused.append(output)
            if refused:
                emit(EngineOutputs(outputs=refused, stats=self.scheduler.take_stats()))
            if self.scheduler.has_work:
                emit(self.step())
            else:
                emit(EngineOutputs(outputs=[], stats=self.scheduler.take_stats()))
            if not self.scheduler.has_work:
                self.executor.forget(self.scheduler.take_finished())
                if not self.scheduler.holds_nothing:
                    logger.error("idle, yet blocks or slots are held")

    def _drain(self) -> list[ToEngine | Prepared]:
        """All messages that are here; waits for one when there is no other work."""
        messages = []
        if not self.scheduler.has_work:
            messages.append(self.inbox.get())
        try:
            while True:
                messages.append(self.inbox.get_nowait())
        except Empty:
            return messages
