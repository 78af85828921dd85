"""A loop that stands still is noticed, and so is who held it."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable

import pytest

from server.observability.loop_lag import LoopLag
from server.observability.metrics import ServerMetrics
from tests.observability.scrape import values


def compute(seconds: float) -> None:
    """With the processor, not the clock."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def wait_for_others() -> None:
    """While another thread computes without holding the interpreter."""
    block = bytes(1 << 20)

    def work() -> None:
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            hashlib.sha256(block)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def stalls(during: Callable[[], None]) -> tuple[dict[str, float], list[float]]:
    """How often by cause, and the longest waits that two scrapes tell."""
    metrics = ServerMetrics("m")

    async def work() -> list[float]:
        lag = LoopLag(metrics)
        lag.start()
        await asyncio.sleep(0.1)
        during()
        await asyncio.sleep(0.1)
        lag.stop()
        lag.stop()
        return [values(metrics)["event_loop_lag_seconds"] for _ in range(2)]

    peaks = asyncio.run(work())
    told = values(metrics)
    causes = ("loop", "threads", "machine")
    return {cause: told[f"event_loop_stalls_total{{cause={cause}}}"] for cause in causes}, peaks


@pytest.mark.parametrize(
    ("during", "cause"),
    [(lambda: compute(0.2), "loop"), (wait_for_others, "threads"), (lambda: time.sleep(0.2), "machine")],
    ids=["loop", "threads", "machine"],
)
def test_a_stall_is_counted_by_its_cause(during: Callable[[], None], cause: str) -> None:
    counts, (peak, after) = stalls(during)
    assert counts[cause] >= 1
    if cause != "loop":
        assert counts["loop"] == 0
    assert peak >= 0.15
    assert after == 0  # it was told, and the timer has stopped


def test_a_loop_that_serves_everybody_has_none() -> None:
    counts, _ = stalls(lambda: compute(0.01))
    assert counts["loop"] == counts["threads"] == 0
