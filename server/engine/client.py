"""How the API reaches the engine: the same frozen messages to a thread or to a process.

`ThreadClient` keeps all in one interpreter; `ProcessClient` gives the engine its own, so that HTTP work cannot hold
the interpreter lock during a step. Callbacks run in a thread of the client's; they must hand over and return.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Protocol

import msgspec

from server.engine.core import AbortRequests, EngineCore, EngineFailed, EngineInfo, FromEngine, Shutdown, ToEngine
from server.errors import CheckpointError, ConfigError, EngineDeadError
from server.types import EngineOutputs, EngineRequest

logger = logging.getLogger(__name__)

CoreFactory = Callable[[], EngineCore]
OnOutputs = Callable[[EngineOutputs], None]
OnDeath = Callable[[str], None]

JOIN_SECONDS = 10.0


class EngineClient(Protocol):
    """Start once, submit messages from any thread, close once."""

    def start(self, on_outputs: OnOutputs, on_death: OnDeath) -> EngineInfo:
        """Build the engine and wait until it is ready. Raises ConfigError when it cannot start."""
        ...

    def submit(self, message: EngineRequest | AbortRequests) -> None:
        """Send without waiting. Raises EngineDeadError when the engine is gone."""
        ...

    def close(self) -> None:
        """Stop the engine and wait for it."""
        ...


class ThreadClient:
    """The engine in a thread of this process."""

    def __init__(self, factory: CoreFactory) -> None:
        self._factory = factory
        self._core: EngineCore | None = None
        self._thread: threading.Thread | None = None

    def start(self, on_outputs: OnOutputs, on_death: OnDeath) -> EngineInfo:
        core = self._core = self._factory()

        def serve() -> None:
            try:
                core.run(on_outputs)
            except Exception as error:
                logger.exception("the engine died")
                on_death(type(error).__name__)

        self._thread = threading.Thread(target=serve, name="engine", daemon=True)
        self._thread.start()
        return core.info

    def submit(self, message: EngineRequest | AbortRequests) -> None:
        if self._core is None or self._thread is None or not self._thread.is_alive():
            raise EngineDeadError("the engine is not running")
        self._core.inbox.put(message)

    def close(self) -> None:
        if self._core is not None and self._thread is not None:
            self._core.inbox.put(Shutdown())
            self._thread.join(JOIN_SECONDS)


class ProcessClient:
    """The engine in a process of its own, over a pair of pipes.

    `factory` must be importable by the child (a module-level function or a partial of one). Messages are msgpack; a
    writer thread encodes and sends them, since a request with pictures is larger than a pipe holds.
    """

    def __init__(self, factory: CoreFactory) -> None:
        self._factory = factory
        self._outbox: SimpleQueue[ToEngine] = SimpleQueue()
        self._process: multiprocessing.process.BaseProcess | None = None
        self._threads: list[threading.Thread] = []
        self._closing = False
        self._gone = False  # its pipe ended, which is seen a moment before the process counts as dead

    def start(self, on_outputs: OnOutputs, on_death: OnDeath) -> EngineInfo:
        context = multiprocessing.get_context("spawn")
        child_reads, parent_writes = context.Pipe(duplex=False)
        parent_reads, child_writes = context.Pipe(duplex=False)
        process = context.Process(
            target=_serve_in_child, args=(self._factory, child_reads, child_writes), name="engine", daemon=True
        )
        process.start()
        child_reads.close()
        child_writes.close()
        self._process = process
        info = self._await_ready(parent_reads)
        self._threads = [
            threading.Thread(target=self._write, args=(parent_writes,), name="to-engine", daemon=True),
            threading.Thread(
                target=self._read, args=(parent_reads, on_outputs, on_death), name="from-engine", daemon=True
            ),
        ]
        for thread in self._threads:
            thread.start()
        return info

    def _await_ready(self, reads: Connection) -> EngineInfo:
        try:
            message = _DECODE_FROM_ENGINE.decode(reads.recv_bytes())
        except EOFError:
            raise ConfigError("the engine process ended before it was ready") from None
        if isinstance(message, EngineFailed):
            raise ConfigError(message.message)
        if not isinstance(message, EngineInfo):
            raise ConfigError("the engine process answered out of turn")
        return message

    def _write(self, writes: Connection) -> None:
        while True:
            message = self._outbox.get()
            try:
                writes.send_bytes(_ENCODE(message))
            except OSError:
                return  # the reader notices the same death and reports it
            if isinstance(message, Shutdown):
                return

    def _read(self, reads: Connection, on_outputs: OnOutputs, on_death: OnDeath) -> None:
        while True:
            try:
                message = _DECODE_FROM_ENGINE.decode(reads.recv_bytes())
            except (EOFError, OSError):
                self._gone = True
                if not self._closing:
                    logger.error("the engine process is gone")
                    on_death("the engine process is gone")
                return
            if isinstance(message, EngineOutputs):
                on_outputs(message)

    def submit(self, message: EngineRequest | AbortRequests) -> None:
        if self._process is None or self._gone or not self._process.is_alive():
            raise EngineDeadError("the engine is not running")
        self._outbox.put(message)

    def close(self) -> None:
        self._closing = True
        if self._process is None:
            return
        if not self._threads:
            self._process.kill()  # still loading: nothing of it is worth waiting for
        self._outbox.put(Shutdown())
        self._process.join(JOIN_SECONDS)
        if self._process.is_alive():
            logger.warning("the engine did not stop within %g s; killing it", JOIN_SECONDS)
            self._process.kill()
            self._process.join()
        for thread in self._threads:
            thread.join(JOIN_SECONDS)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None


_ENCODE = msgspec.msgpack.Encoder().encode
_DECODE_FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
_DECODE_TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)


def _serve_in_child(factory: CoreFactory, reads: Connection, writes: Connection) -> None:
    """The engine process: a reader thread keeps the pipe empty while the main thread steps."""
    # Ctrl-C reaches the whole foreground group; the parent decides when the engine stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        core = factory()
    except (ConfigError, CheckpointError) as error:
        writes.send_bytes(_ENCODE(EngineFailed(str(error))))
        return

    def read() -> None:
        while True:
            try:
                message = _DECODE_TO_ENGINE.decode(reads.recv_bytes())
            except (EOFError, OSError):
                # The parent is gone, and with it every reader of what a step would make.
                os._exit(1)
            core.inbox.put(message)
            if isinstance(message, Shutdown):
                return

    threading.Thread(target=read, name="inbox", daemon=True).start()
    writes.send_bytes(_ENCODE(core.info))
    core.run(lambda outputs: writes.send_bytes(_ENCODE(outputs)))
