"""When an engine counts as hanging, by a clock of the test's own."""

from __future__ import annotations

import pytest

from server.engine.progress import ProgressWatch
from server.types import EngineOutput, EngineOutputs, StepStats

IDLE = EngineOutputs(outputs=[], stats=StepStats())
BUSY_WITH_NOTHING = EngineOutputs(outputs=[], stats=StepStats(num_running=1))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A watch over an engine that uses `load` of a processor."""

    def __init__(self, *, stall_seconds: float | None = None, load: float | None = 0.0) -> None:
        self.clock = Clock()
        self.watch = ProgressWatch(stall_seconds=stall_seconds, clock=self.clock)
        self.load = load
        self.cpu_seconds = 0.0
        self.watch.look(self._cpu())

    def _cpu(self) -> float | None:
        return None if self.load is None else self.cpu_seconds

    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        self.cpu_seconds += seconds * (self.load or 0.0)

    def seconds_until_stalled(self, most: float = 10_000.0) -> float:
        begun = self.clock.now
        while not self.watch.is_stalled:
            assert self.clock.now < begun + most, "never"
            self.pass_time(self.watch.period)
            self.watch.look(self._cpu())
        return self.clock.now - begun


@pytest.mark.parametrize("load", [0.0, None, 0.01])
def test_silence_lasts_three_times_the_longest_step_or_five_seconds(load: float | None) -> None:
    assert Watched(load=load).seconds_until_stalled() == pytest.approx(15, abs=1)
    slow = Watched(load=load)
    slow.watch.expect_steps(40.0)
    assert slow.seconds_until_stalled() == pytest.approx(120, abs=1)


def test_a_longer_step_counts_until_it_is_long_ago() -> None:
    engine = Watched()
    engine.watch.expect_steps(6.0)
    engine.watch.note(EngineOutputs(outputs=[], stats=StepStats(step_seconds=60.0, num_computed_tokens=1)))
    assert engine.watch.limit == 180
    engine.pass_time(600)
    engine.watch.look(None)
    assert engine.watch.limit == pytest.approx(90)
    engine.pass_time(6000)
    engine.watch.look(None)
    assert engine.watch.limit == 18, "what was measured at the start may come at any time"


def test_the_operators_limit_is_exact_and_looked_at_often() -> None:
    assert Watched(stall_seconds=0.2).watch.period == 0.05
    assert Watched(stall_seconds=2.0).seconds_until_stalled() == pytest.approx(2.0, abs=0.5)


def test_who_uses_the_processor_gets_ten_times_as_long() -> None:
    assert Watched(load=1.0).seconds_until_stalled() == pytest.approx(150, abs=2)
    assert Watched(load=0.03).seconds_until_stalled() == pytest.approx(150, abs=2)


def test_who_stops_using_it_has_used_up_a_tenth() -> None:
    engine = Watched(load=1.0)
    for _ in range(50):
        engine.pass_time(1.0)
        engine.watch.look(engine.cpu_seconds)
    assert not engine.watch.is_stalled
    engine.load = 0.0
    assert engine.seconds_until_stalled() == pytest.approx(10, abs=1)


@pytest.mark.parametrize(
    "said",
    [
        IDLE,
        EngineOutputs(outputs=[], stats=StepStats(num_waiting=2, num_held=2)),
        EngineOutputs(outputs=[], stats=StepStats(num_running=1, num_computed_tokens=384)),
        EngineOutputs(outputs=[], stats=StepStats(num_running=1, num_tile_shares=1)),
        EngineOutputs(
            outputs=[EngineOutput(request_id="r", new_token_ids=[], error="refused")], stats=StepStats(num_running=1)
        ),
    ],
)
def test_whatever_gets_done_is_progress(said: EngineOutputs) -> None:
    engine = Watched()
    engine.pass_time(14.0)
    engine.watch.note(said)
    assert engine.watch.look(0.0)
    assert engine.seconds_until_stalled() == pytest.approx(15, abs=1)


def test_talk_without_work_is_none() -> None:
    engine = Watched()
    for _ in range(30):
        engine.pass_time(1.0)
        engine.watch.note(BUSY_WITH_NOTHING)
        engine.watch.look(0.0)
    assert engine.watch.is_stalled


def test_nobody_is_to_blame_for_time_in_which_the_watcher_did_not_run() -> None:
    engine = Watched()
    engine.pass_time(3600.0)
    engine.watch.look(0.0)
    assert engine.watch.stalled_seconds == 2.0
