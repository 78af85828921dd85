"""A request of several pictures is preempted between any two steps: the same tokens, no tile encoded a third time."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

from server.engine.limits import SchedulerLimits
from server.engine.scheduler import Scheduler
from server.engine.step import SchedulerOutput
from server.engine.step_plan import StepPlan
from server.inputs.placeholders import PromptIds
from server.types import EngineRequest, SamplingParams
from tests.runner.faults import Told, make_core
from tests.runner.test_vision_runner import make_tile

LIMITS = {"max_num_batched_tokens": 64, "max_num_seqs": 4, "num_tile_slots": 2, "enable_prefix_caching": False}


INTRUDER = EngineRequest(
    request_id="intruder",
    prompt_token_ids=[1, *range(5000, 5070)],
    sampling=SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True),
    eos_token_ids=(2,),
    priority=-1,
)


class PreemptingScheduler(Scheduler):
    """Preempts the request "victim" once, where it has computed so many tokens; an intruder gets its blocks."""

    def __init__(self, limits: SchedulerLimits, *, at: int) -> None:
        super().__init__(limits)
        self.at = at

    def schedule(self) -> SchedulerOutput:
        for request in list(self._running):
            if request.request_id == "victim" and request.num_computed_tokens == self.at:
                self.at = -1
                self._preempt(StepPlan(self.limits, self.encoder, self._counts), request)
                free = self.kv.pool.allocate(self.kv.pool.num_free) or []
                self.kv.pool.release(free[::-1])  # used last, given out first
                self.add(INTRUDER)
        return super().schedule()


def make_pictured(name: str, seed: int, *, num_words: int, max_tokens: int = 4) -> EngineRequest:
    """Words, three pictures in a row, and words."""
    prompt = PromptIds(fake_token_id=32000, image_token_id=32001, rows_per_tile=64)
    prompt.add_ids([1, *range(100 * seed, 100 * seed + num_words)])
    prompt.add_tiles(3)
    prompt.add_ids(list(range(3000, 3020)))
    return EngineRequest(
        request_id=name,
        prompt_token_ids=prompt.token_ids,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.9, seed=seed, ignore_eos=True),
        eos_token_ids=(2,),
        tiles=tuple(make_tile(42, 56, 10 * seed + index) for index in range(3)),
        placeholders=tuple(prompt.placeholders),
    )


def times_encoded(told: Told, request: EngineRequest) -> list[int]:
    encoded = Counter(tile.key for step, _ in told.steps for tile in step.tiles)
    return [encoded[tile.key] for tile in request.tiles]


def test_preempted_before_within_or_after_its_pictures(tiny_checkpoint: Path) -> None:
    victim = make_pictured("victim", 1, num_words=70)
    neighbour = make_pictured("neighbour", 2, num_words=5, max_tokens=20)  # wants the same two slots
    alone = {
        request.request_id: Told(make_core(tiny_checkpoint)).serve([request]).tokens[request.request_id]
        for request in (victim, neighbour, INTRUDER)
    }
    calm = Told(make_core(tiny_checkpoint, **LIMITS)).serve([neighbour, victim])
    moments = [
        item.num_computed_tokens for step, _ in calm.steps for item in step.scheduled if item.request_id == "victim"
    ][1:]
    first, last = victim.placeholders[0].offset, victim.placeholders[-1].end
    assert sum(moment < first for moment in moments) >= 1
    assert sum(first < moment < last for moment in moments) >= 3
    assert sum(moment > last for moment in moments) >= 2
    most = 0
    for moment in moments:
        scheduler = functools.partial(PreemptingScheduler, at=moment)
        told = Told(make_core(tiny_checkpoint, scheduler, **LIMITS)).serve([neighbour, victim])
        assert told.preemptions == 1
        assert told.tokens == alone, f"preempted at {moment}"
        assert max(times_encoded(told, victim) + times_encoded(told, neighbour)) <= 2
        most = max(most, *times_encoded(told, victim))
    assert most == 2, "no tile had to be encoded again: the slots were too many to mean anything"
