"""Random operations on a scheduler, its books checked after each, in steps of which some go wrong."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

from server.engine.limits import SchedulerLimits
from server.engine.scheduler import MAX_TRIES, Scheduler
from server.engine.step import ModelRunnerOutput, ScheduledRequest, SchedulerOutput
from server.types import EngineOutput, RequestOrigin
from tests.factories import FakeExecutor, expected_answer, make_limits, make_request, make_tile

KINDS = (
    *("add", "abort", "finish", "preempt", "prefix hit", "tile hit", "partial tile", "release", "choice"),
    *("defer", "starved tile", "out of memory", "fail", "broken tile", "lost step"),
)
TILES = "abcdef"


class LostStepError(Exception):
    """A step that nobody in particular is to blame for."""


class TroubledExecutor(FakeExecutor):
    """In some steps a request crashes or a tile is broken; in others, several in a row, memory is short.

    `deferrals` counts, by request, how often in a row; `seen` counts what happened.
    """

    def __init__(self, rng: random.Random, seen: Counter[str]) -> None:
        super().__init__()
        self.rng = rng
        self.seen = seen
        self.lean_steps = 0
        self.deferrals: Counter[str] = Counter()
        self.running: set[str] = set()  # that have not been preempted since

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        trouble = self.rng.random()
        if trouble < 0.02:
            self.lean_steps = self.rng.randint(1, 8)
        self.lean_steps = max(self.lean_steps - 1, 0)
        starved = {tile.slot for tile in step.tiles if self._has_no_memory()}
        deferred = {
            item.request_id
            for item in step.scheduled
            if self._has_no_memory() or not starved.isdisjoint(item.tile_slots.values())
        } | {tile.request_id for tile in step.tiles if tile.slot in starved and tile.request_id in self.running}
        crashed = {item.request_id for item in step.scheduled if self.rng.random() < 0.002}
        kept = [item for item in step.scheduled if item.request_id not in deferred | crashed]
        self.broken_tiles = {make_tile(self.rng.choice(TILES)).key} if trouble > 0.8 else set()
        result = self._execute_kept(step, kept, starved)
        if 0.02 < trouble < 0.025:
            raise LostStepError
        deferred -= result.failed.keys()
        self.seen["starved tile"] += len(starved)
        self.seen["broken tile"] += len(result.failed_slots)
        for request_id in result.sampled:
            self.deferrals[request_id] = 0
        crashed -= deferred
        self.deferrals.update(deferred)
        return dataclasses.replace(
            result,
            failed=result.failed | dict.fromkeys(crashed, "crashed"),
            crashed=frozenset(crashed),
            deferred=frozenset(deferred),
            failed_slots=result.failed_slots | starved,
        )

    def _has_no_memory(self) -> bool:
        return self.lean_steps > 0 and self.rng.random() < 0.7

    def _execute_kept(
        self, step: SchedulerOutput, kept: list[ScheduledRequest], starved: set[int]
    ) -> ModelRunnerOutput:
        tiles = [tile for tile in step.tiles if tile.slot not in starved]
        for slot in starved:
            self.slots.pop(slot, None)
        return super().execute(dataclasses.replace(step, scheduled=kept, tiles=tiles))


def random_limits(rng: random.Random) -> SchedulerLimits:
    return make_limits(
        num_blocks=rng.choice([16, 24, 40]),
        max_model_len=64,
        max_num_seqs=rng.choice([2, 4, 8]),
        max_num_batched_tokens=rng.choice([8, 16, 64]),
        max_num_batched_pixels=rng.choice([2, 5, 12]),
        num_tile_slots=rng.choice([1, 3, 8]),
        enable_prefix_caching=rng.random() < 0.8,
    )


class Life:
    """A scheduler from its first request to its last. Everything follows from the seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.seen: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        self.scheduler = Scheduler(random_limits(self.rng))
        self.executor = TroubledExecutor(self.rng, self.seen)
        self.keys = self.rng.choice([("",), ("a", "b", "c")])
        self.alive: list[str] = []
        self.held: list[str] = []
        self.wanted: dict[str, list[int]] = {}
        self.answers: dict[str, list[int]] = {}

    def operate(self) -> None:
        """One operation, and a look into the books."""
        roll = self.rng.random()
        if roll < 0.15 and len(self.alive) < 12:
            self._add()
        elif roll < 0.19 and self.alive:
            victim = self.alive.pop(self.rng.randrange(len(self.alive)))
            self.scheduler.abort([victim])
            self.wanted.pop(victim)
            self.seen["abort"] += 1
        elif roll < 0.23 and self.held:
            self.scheduler.release(self.held.pop(self.rng.randrange(len(self.held))))
            self.seen["release"] += 1
        elif self.scheduler.has_work:
            self._step()
        self.scheduler.check_integrity()

    def _add(self) -> None:
        rng = self.rng
        start = rng.choice([0, 0, 300])  # few distinct beginnings: many prefix hits
        request = make_request(
            range(start, start + rng.randint(1, 20)),
            tiles=[rng.choice(TILES) for _ in range(rng.choice([0, 0, 1, 3]))],
            num_pixels=4,
            max_tokens=rng.randint(1, 24),
            priority=rng.choice([0, 0, 1]),
            origin=RequestOrigin(key=rng.choice(self.keys)),
            n=rng.choice([1, 1, 1, 3]),
        )
        is_held = rng.random() < 0.2
        self.scheduler.add(request, held=is_held)
        self.held += [request.request_id] * is_held
        self.alive += request.choice_ids
        self.wanted |= dict.fromkeys(request.choice_ids, expected_answer(request))
        self.seen["add"] += 1

    def _step(self) -> None:
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        stats = self.scheduler.take_stats()
        self.seen["preempt"] += stats.num_preemptions
        self.seen["prefix hit"] += stats.prefix_hits > 0
        self.seen["tile hit"] += stats.tile_hits
        self.seen["partial tile"] += any(not tile.is_last_share for tile in plan.tiles)
        self.executor.running = {request.request_id for request in self.scheduler._running}
        try:
            result = self.executor.execute(plan)
        except LostStepError:
            outputs = self.scheduler.fail_step(plan, "lost")
            self.seen["lost step"] += 1
        else:
            outputs = self.scheduler.update(plan, result)
            self.seen["defer"] += len(result.deferred)
        for output in outputs:
            self._take(output)
        self.scheduler.take_stats()  # where what was put off counts as preempted too

    def _take(self, output: EngineOutput) -> None:
        """Nobody gets another token than the right one, and who had no memory gets every try and no more."""
        request_id = output.request_id
        answer = self.answers.setdefault(request_id, [])
        answer += output.new_token_ids
        if output.finish_reason is None:
            return
        self.alive.remove(request_id)
        wanted = self.wanted.pop(request_id)
        self.seen["choice"] += "/" in request_id
        starved = self.executor.deferrals.pop(request_id, 0) == MAX_TRIES
        assert (output.error_code == "out_of_memory") is starved
        if output.error is None:
            assert answer == wanted
            self.seen["finish"] += 1
        else:
            assert answer == wanted[: len(answer)]
            self.seen["out of memory" if starved else "fail"] += 1

    def end(self) -> None:
        """Cancel whoever is left: nothing may be held, and every slot and block be there."""
        scheduler = self.scheduler
        scheduler.abort(self.alive)
        scheduler.check_integrity()
        assert scheduler.holds_nothing
        assert (scheduler.num_waiting, scheduler.num_running) == (0, 0)
        assert scheduler.kv.pool.num_free == scheduler.limits.num_blocks
        assert scheduler.encoder.num_available == scheduler.limits.num_tile_slots
        self.executor.forget(scheduler.take_finished())
        assert not self.executor.tokens, "the runner keeps requests that have ended"


def live(seed: int, operations: int) -> Counter[str]:
    """So many operations on one scheduler, then its end. How often each of KINDS happened."""
    life = Life(seed)
    for _ in range(operations):
        life.operate()
    life.end()
    return life.seen
