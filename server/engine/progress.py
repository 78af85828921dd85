"""Whether an engine moves. Knows its outputs, a clock and the processor time that it uses; no processes or threads.

Progress is work that gets done, or none to do: an engine that answers and yet computes nothing stands still too.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from server.types import EngineOutputs

# An engine stands still after so many of its longest steps, of which each counts as at least so long.
STALL_STEPS = 3
MIN_STEP_SECONDS = 5.0
HALF_LIFE_SECONDS = 600.0  # of a step that was longer than those measured at the start

MAX_PERIOD_SECONDS = 1.0
# An engine that uses or waits for a processor in this share of its time is slow rather than stuck, or stuck in a loop:
# its time counts a tenth.
BUSY_SHARE = 0.02
BUSY_WEIGHT = 0.1


class ProgressWatch:
    """Adds up the time in which an engine has not moved. `note` may be called from any thread, the rest from one.

    Only time in which the watcher itself ran counts: if all of the machine stood still, nobody is to blame.
    """

    def __init__(self, *, stall_seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """`stall_seconds` is how long an engine may stand still; None: as its own steps say."""
        self._stall_seconds = stall_seconds
        self._clock = clock
        self._usual_step = MIN_STEP_SECONDS
        self._longest_step = MIN_STEP_SECONDS
        self._has_moved = False
        self._last_look = clock()
        self._cpu_seconds: float | None = None
        self.stalled_seconds = 0.0

    def expect_steps(self, longest_seconds: float) -> None:
        """Steps of that length are usual."""
        self._usual_step = max(longest_seconds, MIN_STEP_SECONDS)
        self._longest_step = max(self._longest_step, longest_seconds)

    @property
    def limit(self) -> float:
        """Seconds of standing still that mean that an engine hangs."""
        return STALL_STEPS * self._longest_step if self._stall_seconds is None else self._stall_seconds

    @property
    def period(self) -> float:
        """Seconds between two looks."""
        return min(self.limit / 4, MAX_PERIOD_SECONDS)

    @property
    def is_stalled(self) -> bool:
        return self.stalled_seconds >= self.limit

    def note(self, outputs: EngineOutputs) -> None:
        """The engine has said this."""
        stats = outputs.stats
        has_work = stats.num_running + stats.num_waiting > stats.num_held
        if outputs.outputs or stats.num_computed_tokens or stats.num_tile_shares or not has_work:
            self._has_moved = True
        self._longest_step = max(self._longest_step, stats.step_seconds)

    def look(self, cpu_seconds: float | None) -> bool:
        """Whether the engine has moved since the last look; `cpu_seconds` as clients tell it."""
        now, cpu_before = self._clock(), self._cpu_seconds
        elapsed, self._last_look, self._cpu_seconds = now - self._last_look, now, cpu_seconds
        self._longest_step = max(self._longest_step * 0.5 ** (elapsed / HALF_LIFE_SECONDS), self._usual_step)
        has_moved, self._has_moved = self._has_moved, False
        if has_moved:
            self.stalled_seconds = 0.0
            return True
        is_busy = (
            cpu_seconds is not None and cpu_before is not None and cpu_seconds - cpu_before >= BUSY_SHARE * elapsed
        )
        self.stalled_seconds += min(elapsed, 2 * self.period) * (BUSY_WEIGHT if is_busy else 1.0)
        return False
