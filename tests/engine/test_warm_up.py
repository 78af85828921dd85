"""The first steps of an engine: as large as any later one, and nothing of them is found again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from server.engine.core import EngineCore
from server.engine.step import ModelRunnerOutput, SchedulerOutput
from server.engine.warm_up import warm_up
from server.errors import ConfigError
from server.runner.model_runner import ModelRunner
from tests.engines import drive, real_core
from tests.factories import FakeExecutor, make_limits, make_request

ROWS = 4


def steps_of(**limits: int | bool) -> tuple[FakeExecutor, list[SchedulerOutput]]:
    executor = FakeExecutor()
    assert warm_up(make_limits(**limits), executor, tile_edge=2, rows_per_tile=ROWS) > 0
    assert not executor.tokens, "the executor keeps requests that have ended"
    return executor, executor.steps


def test_the_first_step_fills_both_budgets() -> None:
    _, steps = steps_of(max_num_batched_tokens=48, max_num_batched_pixels=5 * 4)
    assert sum(item.num_tokens for item in steps[0].scheduled) == 48
    assert len(steps[0].tiles) == 5
    assert len({tile.slot for tile in steps[0].tiles}) == 5


def test_several_answers_grow_at_once_and_sample_in_all_ways() -> None:
    _, steps = steps_of()
    decoding = [step for step in steps if sum(item.num_tokens == 1 for item in step.scheduled) > 1]
    assert len(decoding) >= 2
    samplings = [new.sampling for step in steps for new in step.new_requests]
    assert {sampling.temperature == 0 for sampling in samplings} == {True, False}
    assert any(sampling.num_prompt_logprobs is not None for sampling in samplings)
    assert any(sampling.repetition_penalty != 1 for sampling in samplings)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_num_seqs": 1},
        {"max_model_len": 16, "num_blocks": 4},
        {"max_model_len": 16, "num_blocks": 4, "block_size": 4, "max_num_batched_tokens": 8, "max_num_seqs": 1},
        {"num_tile_slots": 1, "max_num_batched_pixels": 5 * 4},
        {"max_num_batched_tokens": 1, "max_num_seqs": 1},
        {"max_num_batched_tokens": 4096, "max_num_batched_pixels": 1024 * 4},
        {"enable_prefix_caching": False},
    ],
)
def test_it_fits_whatever_the_engine_was_given(limits: dict[str, int | bool]) -> None:
    steps_of(**limits)


class FailingExecutor(FakeExecutor):
    """Does something to the result of each step that has more than one token."""

    def __init__(self, fail: Callable[[ModelRunnerOutput, list[str]], ModelRunnerOutput]) -> None:
        super().__init__()
        self._fail = fail

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        return self._fail(super().execute(step), [item.request_id for item in step.scheduled])


def explode(result: ModelRunnerOutput, names: list[str]) -> ModelRunnerOutput:
    raise MemoryError("8 GiB\nand more")


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (explode, "a step of 32 tokens and 1 tiles failed: MemoryError"),
        (lambda result, names: replace(result, failed=dict.fromkeys(names, "not a number")), "failed: not a number"),
        (lambda result, names: replace(result, deferred=frozenset(names)), "no memory for a step of 32 tokens"),
    ],
)
def test_a_step_that_fails_stops_the_start(
    fail: Callable[[ModelRunnerOutput, list[str]], ModelRunnerOutput], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        warm_up(make_limits(), FailingExecutor(fail), tile_edge=2, rows_per_tile=ROWS)
    assert "\n" not in str(caught.value)


def is_untouched(core: EngineCore) -> bool:
    core.scheduler.check_integrity()
    assert isinstance(core.executor, ModelRunner)
    return core.scheduler.holds_nothing and not core.executor._states and not core.scheduler.take_stats().prefix_queries


def test_a_real_engine_answers_as_if_it_had_not_been_warmed_up(tiny_checkpoint: Path) -> None:
    cold, warm = real_core(tiny_checkpoint), real_core(tiny_checkpoint, warm_up=True)
    assert is_untouched(warm)
    assert cold.info.longest_step_seconds == 0
    assert warm.info.longest_step_seconds > 0
    requests = [make_request([index % 100 for index in range(40)], request_id=name, max_tokens=8) for name in "ab"]
    answers = [drive(core, requests) for core in (cold, warm)]
    assert answers[0].tokens == answers[1].tokens
    assert answers[1].cached["a"] == 0, "it began like a prompt of the warm-up"
