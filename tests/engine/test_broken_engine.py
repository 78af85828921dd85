"""When an engine gives up: a failure that every later step would repeat ends the loop, and no other does."""

from __future__ import annotations

import dataclasses
import functools
import threading
from pathlib import Path

import pytest

from server.engine.client import EngineClient, ProcessClient, ThreadClient
from server.engine.core import MAX_LOST_STEPS, EngineCore, Shutdown
from server.engine.step import ModelRunnerOutput, SchedulerOutput
from server.errors import EngineBrokenError
from server.types import EngineOutputs
from tests.factories import FakeExecutor, make_core, make_request
from tests.runner import faults


class LosingExecutor(FakeExecutor):
    """Says of all requests of a step that they `crashed`, `failed` or are `deferred`, as told for each step."""

    def __init__(self, *fates: str) -> None:
        super().__init__()
        self.fates = list(fates)

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        names = [item.request_id for item in step.scheduled]
        fate = self.fates.pop(0) if self.fates else "fine"
        if fate == "fine":
            return super().execute(step)
        super().execute(dataclasses.replace(step, scheduled=[]))
        if fate == "broken":
            raise EngineBrokenError("injected")
        if fate == "raises":
            raise RuntimeError("injected")
        if fate == "deferred":
            return ModelRunnerOutput(sampled={}, deferred=frozenset(names))
        crashed = frozenset(names if fate == "crashed" else ())
        return ModelRunnerOutput(sampled={}, failed=dict.fromkeys(names, "injected"), crashed=crashed)


def losing_core(*fates: str) -> EngineCore:
    core = make_core()
    core.executor = LosingExecutor(*fates)
    return core


def steps_survived(core: EngineCore, *, num_requests: int, limit: int = 20) -> int:
    """Steps with so many new requests each until the engine gives up, or `limit`."""
    for index in range(limit):
        for _ in range(num_requests):
            core.scheduler.add(make_request(4, max_tokens=1))
        try:
            core.step()
        except EngineBrokenError:
            return index
        core.scheduler.check_integrity()
    return limit


@pytest.mark.parametrize("fate", ["crashed", "raises"])
def test_steps_that_are_lost_whole_one_after_the_other_end_the_engine(fate: str) -> None:
    assert steps_survived(losing_core(*[fate] * 20), num_requests=2) == MAX_LOST_STEPS - 1


@pytest.mark.parametrize("fate", ["crashed", "raises"])
def test_one_request_alone_never_ends_the_engine(fate: str) -> None:
    assert steps_survived(losing_core(*[fate] * 20), num_requests=1) == 20


@pytest.mark.parametrize("fate", ["fine", "failed", "deferred"])
def test_a_step_that_is_lost_to_nothing_or_to_its_requests_own_fault_begins_the_count_again(fate: str) -> None:
    assert steps_survived(losing_core(*["crashed", "crashed", fate] * 7), num_requests=2) == 20


def test_a_broken_engine_leaves_its_loop_without_a_word_to_its_requests() -> None:
    core = losing_core("fine", "broken")
    core.inbox.put(make_request(4, max_tokens=9))
    emitted: list[EngineOutputs] = []

    def emit(batch: EngineOutputs) -> None:
        emitted.append(batch)
        if any(output.error for output in batch.outputs):
            core.inbox.put(Shutdown())

    with pytest.raises(EngineBrokenError):
        core.run(emit)
    assert [output.error for batch in emitted for output in batch.outputs] == [None]


@pytest.mark.parametrize("client_type", [ThreadClient, ProcessClient])
def test_a_device_that_breaks_ends_the_engine_and_its_client_hears_of_it(
    tiny_checkpoint: Path, client_type: type[ThreadClient] | type[ProcessClient]
) -> None:
    client: EngineClient = client_type(functools.partial(faults.core_without_device, tiny_checkpoint))
    died = threading.Event()
    outputs: list[EngineOutputs] = []
    client.start(outputs.append, died.set)
    try:
        for prompt in ([1, 400], [1, 500]):
            client.submit(make_request(prompt, max_tokens=4))
        assert died.wait(30)
    finally:
        client.close()
    assert not any(batch.outputs for batch in outputs)
