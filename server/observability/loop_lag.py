"""How late the event loop is: every stream, health check and timer on it waits as long as this one does."""

from __future__ import annotations

import asyncio
import time

from server.observability.instruments import LOOP_STALL_SECONDS, StallCause
from server.observability.metrics import ServerMetrics

_PERIOD_SECONDS = 0.02


class LoopLag:
    """A timer of a running loop that records how much later than asked it was woken. Between `start` and `stop`."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._sleep()

    def stop(self) -> None:
        """Harmless where it has not been started."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _sleep(self) -> None:
        self._thread_seconds, self._process_seconds = time.thread_time(), time.process_time()
        self._due = time.monotonic() + _PERIOD_SECONDS
        self._timer = self._loop.call_later(_PERIOD_SECONDS, self._wake)

    def _wake(self) -> None:
        late = max(time.monotonic() - self._due, 0.0)
        self._metrics.record_loop_lag(late, cause=self._cause() if late > LOOP_STALL_SECONDS else None)
        self._sleep()

    def _cause(self) -> StallCause:
        """Whose processor time alone is as long as a stall: the loop's thread's, all of the process's, or neither's."""
        if time.thread_time() - self._thread_seconds >= LOOP_STALL_SECONDS:
            return "loop"
        if time.process_time() - self._process_seconds >= LOOP_STALL_SECONDS:
            return "threads"
        return "machine"
