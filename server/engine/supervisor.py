"""Keeps an engine running: watches it, ends it when it hangs, starts another when it is gone, gives up in the end.

Knows clients and time; knows nothing of requests. Whoever listens decides what becomes of those that an engine held.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Literal

from server.engine.client import EngineClient
from server.engine.core import EngineInfo, Ping
from server.engine.progress import ProgressWatch
from server.errors import EngineDeadError
from server.types import EngineOutputs

logger = logging.getLogger(__name__)

LossCause = Literal["died", "hung"]

WINDOW_SECONDS = 600.0  # in which `max_restarts` count
# Before the second restart in a row and on, doubled each time: what kills engines may be the machine's state.
FIRST_PAUSE_SECONDS = 1.0
MAX_PAUSE_SECONDS = 30.0
# A start that takes so much longer than the first one will not end; a cold disk is slow, but not as slow as that.
START_FACTOR = 10.0
MIN_START_SECONDS = 120.0


@dataclass(frozen=True)
class EngineLoss:
    """An engine is gone, or could not be started. `back_at` is the time.monotonic() at which another is expected; None:
    there will be none."""

    cause: LossCause
    back_at: float | None


@dataclass(frozen=True)
class EngineListener:
    """Called from threads that must not be kept waiting: hand over and return. Order is kept.

    Nothing comes from an engine after its `on_lost`, or before its `on_ready`. `on_lost` comes again when a restart
    fails.
    """

    on_outputs: Callable[[EngineOutputs], None]
    on_ready: Callable[[EngineClient, EngineInfo], None]
    on_lost: Callable[[EngineLoss], None]


@dataclass(frozen=True)
class _Engine:
    client: EngineClient
    progress: ProgressWatch


class EngineSupervisor:
    """Start once, close once. The engines it starts are handed to the listener, each a client of its own."""

    def __init__(
        self, make_client: Callable[[], EngineClient], *, stall_seconds: float | None, max_restarts: int
    ) -> None:
        """`stall_seconds` is ProgressWatch's; `max_restarts` count within ten minutes."""
        self._make_client = make_client
        self._stall_seconds = stall_seconds
        self._max_restarts = max_restarts
        self._events: SimpleQueue[Literal["died", "close"]] = SimpleQueue()
        self._lock = threading.Lock()
        self._closing = False
        self._starting: EngineClient | None = None
        self._thread: threading.Thread | None = None
        self._losses: deque[float] = deque()
        self._has_given_up = False
        self._pause = 0.0
        self._start_seconds = 0.0  # what the last start took

    def start(self, listener: EngineListener) -> None:
        """Start the first engine and wait until it is ready. Raises ConfigError when it cannot start."""
        self._listener = listener
        engine = self._start_engine(timeout=None)
        self._thread = threading.Thread(target=self._run, args=(engine,), name="engine-supervisor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the engine, also while it starts, and wait for it. From any thread; harmless before `start`."""
        with self._lock:
            self._closing = True
            if self._starting is not None:
                self._starting.kill()
        self._events.put("close")
        if self._thread is not None:
            self._thread.join()

    def _start_engine(self, *, timeout: float | None) -> _Engine:
        with self._lock:
            if self._closing:
                raise EngineDeadError("the server is shutting down")
            client = self._starting = self._make_client()
        progress = ProgressWatch(stall_seconds=self._stall_seconds)

        def on_outputs(outputs: EngineOutputs) -> None:
            progress.note(outputs)
            self._listener.on_outputs(outputs)

        started = time.monotonic()
        try:
            info = client.start(on_outputs, lambda: self._events.put("died"), timeout=timeout)
        except BaseException:
            client.close()
            raise
        finally:
            with self._lock:
                self._starting = None
        self._start_seconds = time.monotonic() - started
        progress.expect_steps(info.longest_step_seconds)
        self._listener.on_ready(client, info)
        return _Engine(client, progress)

    # -- its thread ----------------------------------------------------------------------------------------------

    def _run(self, first: _Engine) -> None:
        engine: _Engine | None = first
        try:
            while engine is not None:
                cause = self._watch(engine)
                lost_at = time.monotonic()
                if cause is None:
                    engine.client.close()
                    return
                self._report_loss(cause, lost_at)
                logger.error("the engine %s: %s", cause, engine.client.close())
                engine = self._restart(lost_at)
        except Exception:
            logger.exception("the engine is not watched any more")
            self._listener.on_lost(EngineLoss("died", None))

    def _watch(self, engine: _Engine) -> LossCause | None:
        """Wait until this engine is gone; None when it is to be closed."""
        client, progress = engine.client, engine.progress
        is_asked = False
        while True:
            with contextlib.suppress(Empty):
                event = self._events.get(timeout=progress.period)
                if event == "close":
                    return None
                return "hung" if progress.is_stalled else "died"
            if progress.look(client.cpu_seconds()):
                is_asked = False
            elif not is_asked:
                is_asked = True
                with contextlib.suppress(EngineDeadError):
                    client.submit(Ping())
            if progress.is_stalled:
                logger.error(
                    "the engine has not moved for %.1f s, the limit is %.1f s", progress.stalled_seconds, progress.limit
                )
                if not client.kill():
                    self._has_given_up = True
                    return "hung"

    def _report_loss(self, cause: LossCause, now: float) -> None:
        """Tell the listener, and decide what follows."""
        self._losses.append(now)
        while self._losses[0] < now - WINDOW_SECONDS:
            self._losses.popleft()
        num_before = len(self._losses) - 1
        self._has_given_up |= num_before >= self._max_restarts
        self._pause = min(FIRST_PAUSE_SECONDS * 2 ** (num_before - 1), MAX_PAUSE_SECONDS) if num_before else 0.0
        back_at = None if self._has_given_up else now + self._pause + self._start_seconds
        self._listener.on_lost(EngineLoss(cause, back_at))

    def _restart(self, lost_at: float) -> _Engine | None:
        """Another engine, after as many tries as are left; None when there are none, or when it is to be closed."""
        while not self._has_given_up:
            with contextlib.suppress(Empty):
                if self._events.get(timeout=self._pause) == "close":
                    return None
            try:
                engine = self._start_engine(timeout=max(START_FACTOR * self._start_seconds, MIN_START_SECONDS))
            except Exception as error:
                if self._closing:
                    return None
                logger.error("the engine cannot be started again: %s", error)
                self._report_loss("died", time.monotonic())
            else:
                logger.info("another engine is ready, %.1f s after the last one was lost", time.monotonic() - lost_at)
                return engine
        logger.critical(
            "no engine any more: %d lost within %g s, the limit is %d restarts",
            len(self._losses),
            WINDOW_SECONDS,
            self._max_restarts,
        )
        return None
