"""Real engine processes that die, hang, or do not start: what a listener is told, and what is left of them."""

from __future__ import annotations

import functools
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from server.engine.client import EngineClient, ProcessClient, ThreadClient
from server.engine.core import EngineCore, EngineInfo
from server.engine.supervisor import EngineListener, EngineLoss, EngineSupervisor
from server.errors import ConfigError, EngineDeadError
from server.types import EngineOutput, EngineOutputs, StepStats
from tests.factories import core_factory, expected_answer, make_core, make_request
from tests.serving import ROOT

WAIT_SECONDS = 60.0


class Listener:
    """Keeps what it is told: engines and losses in `events`, outputs by themselves."""

    def __init__(self) -> None:
        self.events: SimpleQueue[EngineClient | EngineLoss] = SimpleQueue()
        self.outputs: SimpleQueue[EngineOutput] = SimpleQueue()
        self.started: list[str] = []

    def as_listener(self) -> EngineListener:
        return EngineListener(self._on_outputs, self._on_ready, self.events.put)

    def _on_ready(self, engine: EngineClient, info: EngineInfo) -> None:
        assert info.num_blocks == 64
        self.events.put(engine)

    def _on_outputs(self, outputs: EngineOutputs) -> None:
        self.started += outputs.started
        for output in outputs.outputs:
            self.outputs.put(output)

    def engine(self) -> Any:
        event = self.events.get(timeout=WAIT_SECONDS)
        assert not isinstance(event, EngineLoss), event
        return event

    def loss(self) -> EngineLoss:
        event = self.events.get(timeout=WAIT_SECONDS)
        assert isinstance(event, EngineLoss)
        return event

    def answer_of(self, engine: EngineClient) -> None:
        """The engine answers a request as it should."""
        request = make_request(8, max_tokens=3)
        engine.submit(request)
        tokens: list[int] = []
        while len(tokens) < 3:
            output = self.outputs.get(timeout=WAIT_SECONDS)
            if output.request_id == request.request_id:
                tokens += output.new_token_ids
        assert tokens == expected_answer(request)


@contextmanager
def supervised(
    factory: Callable[[], EngineCore] = core_factory,
    *,
    client: type[ProcessClient] | type[ThreadClient] = ProcessClient,
    stall_seconds: float | None = None,
    max_restarts: int = 3,
) -> Iterator[tuple[EngineSupervisor, Listener]]:
    listener = Listener()
    supervisor = EngineSupervisor(
        functools.partial(client, factory), stall_seconds=stall_seconds, max_restarts=max_restarts
    )
    supervisor.start(listener.as_listener())
    try:
        yield supervisor, listener
    finally:
        supervisor.close()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "cause"), [(signal.SIGKILL, "died"), (signal.SIGSTOP, "hung")])
def test_another_engine_takes_the_place_of_one_that_is_gone(
    number: signal.Signals, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    with supervised(stall_seconds=1.0) as (_, listener), caplog.at_level(logging.INFO):
        first = listener.engine()
        listener.answer_of(first)
        os.kill(first.pid, number)
        loss = listener.loss()
        assert loss.cause == cause
        assert loss.back_at is not None
        second = listener.engine()
        assert second.pid != first.pid
        assert not is_running(first.pid)
        with pytest.raises(EngineDeadError):
            first.submit(make_request(4))
        listener.answer_of(second)
    assert not is_running(second.pid)
    assert f"the engine {cause}: SIGKILL ended it" in caplog.text
    assert ("the engine has not moved for" in caplog.text) == (cause == "hung")
    assert "another engine is ready" in caplog.text


def test_an_engine_that_waits_or_works_is_left_alone() -> None:
    with supervised(stall_seconds=1.0) as (_, listener):
        engine = listener.engine()
        time.sleep(2.5)
        listener.answer_of(engine)
        assert listener.events.empty()


def test_restarts_leave_no_threads_and_no_open_files() -> None:
    def counts() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    with supervised(max_restarts=10) as (_, listener):
        engine = listener.engine()
        before = None
        for _ in range(3):
            os.kill(engine.pid, signal.SIGKILL)
            listener.loss()
            engine = listener.engine()
            listener.answer_of(engine)
            before = before or counts()
        wait_until(lambda: counts() == before)


def test_after_so_many_restarts_there_is_no_engine_any_more() -> None:
    with supervised(max_restarts=1) as (_, listener):
        os.kill(listener.engine().pid, signal.SIGKILL)
        assert listener.loss().back_at is not None
        second = listener.engine()
        os.kill(second.pid, signal.SIGKILL)
        assert listener.loss() == EngineLoss("died", None)
        wait_until(lambda: not is_running(second.pid))
        assert listener.events.empty()


def test_restarts_of_long_ago_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.supervisor.WINDOW_SECONDS", 0.0)
    with supervised(max_restarts=1) as (_, listener):
        for _ in range(3):
            os.kill(listener.engine().pid, signal.SIGKILL)
            assert listener.loss().back_at is not None
        listener.answer_of(listener.engine())


def guarded_core(file: Path) -> EngineCore:
    """Does what the file says, once it is there."""
    what = file.read_text() if file.exists() else ""
    if what == "crash":
        os._exit(3)
    if what == "hang":
        threading.Event().wait()
    return make_core()


def test_a_restart_that_fails_is_tried_again(tmp_path: Path) -> None:
    file = tmp_path / "what"
    with supervised(functools.partial(guarded_core, file)) as (_, listener):
        first = listener.engine()
        file.write_text("crash")
        os.kill(first.pid, signal.SIGKILL)
        losses = [listener.loss(), listener.loss()]
        assert [loss.cause for loss in losses] == ["died", "died"]
        assert losses[1].back_at is not None
        assert losses[0].back_at is not None
        assert losses[1].back_at - losses[0].back_at >= 1.0, "there is a pause before the second try"
        file.unlink()
        listener.answer_of(listener.engine())


def test_a_restart_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.supervisor.MIN_START_SECONDS", 0.5)
    monkeypatch.setattr("server.engine.supervisor.START_FACTOR", 0.0)
    file = tmp_path / "what"
    with supervised(functools.partial(guarded_core, file), max_restarts=1) as (_, listener):
        first = listener.engine()
        file.write_text("hang")
        os.kill(first.pid, signal.SIGKILL)
        assert listener.loss().back_at is not None
        assert listener.loss() == EngineLoss("died", None)


def test_closing_waits_for_no_engine_that_starts(tmp_path: Path) -> None:
    file = tmp_path / "what"
    with supervised(functools.partial(guarded_core, file)) as (supervisor, listener):
        first = listener.engine()
        file.write_text("hang")
        os.kill(first.pid, signal.SIGKILL)
        listener.loss()
        wait_until(lambda: supervisor._starting is not None and getattr(supervisor._starting, "pid", None) is not None)
        starting = getattr(supervisor._starting, "pid", None)
        begun = time.monotonic()
        supervisor.close()
        assert time.monotonic() - begun < 10
        assert starting is not None
        assert not is_running(starting)
    assert listener.events.empty()


def test_closing_does_not_wait_for_an_engine_that_hangs() -> None:
    with supervised() as (supervisor, listener):
        engine = listener.engine()
        os.kill(engine.pid, signal.SIGSTOP)
        begun = time.monotonic()
        supervisor.close()
        assert time.monotonic() - begun < 10
        assert not is_running(engine.pid)


def failing_core() -> EngineCore:
    raise ConfigError("max_model_len 99 is more than fits")


def test_the_first_start_fails_at_once_and_says_why() -> None:
    supervisor = EngineSupervisor(functools.partial(ProcessClient, failing_core), stall_seconds=None, max_restarts=3)
    with pytest.raises(ConfigError, match="max_model_len 99"):
        supervisor.start(Listener().as_listener())
    supervisor.close()


class IdlingCore(EngineCore):
    """Steps and computes nothing, for ever."""

    def step(self) -> EngineOutputs:
        time.sleep(0.05)
        return EngineOutputs(outputs=[], stats=StepStats(num_running=1))


def idling_core() -> EngineCore:
    core = make_core()
    return IdlingCore(core.scheduler, core.executor, core.info)


def test_an_engine_that_talks_and_computes_nothing_hangs() -> None:
    with supervised(idling_core, stall_seconds=0.5) as (_, listener):
        listener.engine().submit(make_request(4))
        assert listener.loss().cause == "hung"


class StuckCore(EngineCore):
    def step(self) -> EngineOutputs:
        threading.Event().wait(WAIT_SECONDS)
        raise RuntimeError


def stuck_core() -> EngineCore:
    core = make_core()
    return StuckCore(core.scheduler, core.executor, core.info)


def test_a_thread_that_hangs_cannot_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.client.THREAD_STOP_SECONDS", 0.1)
    with supervised(stuck_core, client=ThreadClient, stall_seconds=0.5) as (_, listener):
        listener.engine().submit(make_request(4))
        assert listener.loss() == EngineLoss("hung", None)


class FragileCore(EngineCore):
    def step(self) -> EngineOutputs:
        raise MemoryError


def fragile_core() -> EngineCore:
    core = make_core()
    return FragileCore(core.scheduler, core.executor, core.info)


def test_a_thread_that_dies_is_replaced() -> None:
    with supervised(fragile_core, client=ThreadClient) as (_, listener):
        first = listener.engine()
        first.submit(make_request(4))
        loss = listener.loss()
        assert loss.cause == "died"
        assert loss.back_at is not None
        assert listener.engine() is not first
        assert first._core is None, "its memory is wanted for the next one"
        with pytest.raises(EngineDeadError):
            first.submit(make_request(4))


def test_work_is_announced_before_it_is_done() -> None:
    with supervised() as (_, listener):
        engine = listener.engine()
        listener.answer_of(engine)
        assert len(listener.started) == 1


ORPHANS = """
import functools, sys, threading, time
from pathlib import Path
from server.engine.client import ProcessClient
from tests.engine.test_supervisor import guarded_core

what = Path(sys.argv[1])
ready = ProcessClient(functools.partial(guarded_core, what))
ready.start(print, print)
what.write_text("hang")
loading = ProcessClient(functools.partial(guarded_core, what))
threading.Thread(target=loading.start, args=(print, print), daemon=True).start()
while loading.pid is None:
    time.sleep(0.01)
print(ready.pid, loading.pid, flush=True)
time.sleep(600)
"""


def test_engines_end_with_their_server_also_while_they_load(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ORPHANS, str(tmp_path / "what")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            engines = [int(pid) for pid in server.stdout.readline().split()]
            assert len(engines) == 2
            assert all(is_running(pid) for pid in engines)
        finally:
            server.kill()
    wait_until(lambda: not any(is_running(pid) for pid in engines))
