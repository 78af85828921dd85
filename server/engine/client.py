"""How the API reaches an engine: the same frozen messages to a thread or to a process.

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
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

import msgspec

from server.engine.core import (
    AbortRequests,
    EngineCore,
    EngineFailed,
    EngineInfo,
    FromEngine,
    Ping,
    Prepared,
    Shutdown,
    ToEngine,
)
from server.errors import CheckpointError, ConfigError, EngineBrokenError, EngineDeadError
from server.observability.logs import LogFormat, configure_logging, log_format
from server.types import EngineOutputs, EngineRequest

logger = logging.getLogger(__name__)

CoreFactory = Callable[[], EngineCore]
OnOutputs = Callable[[EngineOutputs], None]
OnDeath = Callable[[], None]
ToRunning = EngineRequest | AbortRequests | Ping

THREAD_STOP_SECONDS = 10.0
# Nothing in an engine is worth waiting for, but it may be in the middle of a step.
PROCESS_STOP_SECONDS = 2.0
DEAD_STOP_SECONDS = 10.0  # until the kernel has taken down a process that was killed
BROKEN_STATUS = 70  # EX_SOFTWARE of sysexits.h


class EngineClient(Protocol):
    """One engine: started once, given messages from any thread, closed once by whoever started it."""

    def start(self, on_outputs: OnOutputs, on_death: OnDeath, *, timeout: float | None = None) -> EngineInfo:
        """Build the engine and wait until it is ready. Raises ConfigError when it cannot start, or not in time.

        `on_death` is called once if it ends by itself or by `kill`, after the last of its outputs.
        """
        ...

    def submit(self, message: ToRunning) -> None:
        """Send without waiting. Raises EngineDeadError when the engine is known to be gone."""
        ...

    def cpu_seconds(self) -> float | None:
        """Processor time that the engine has used or has had to wait for; None where nobody tells."""
        ...

    def resident_bytes(self) -> int:
        """Main memory of the engine's own process; 0 where it has none, or nobody tells."""
        ...

    def kill(self) -> bool:
        """End the engine at once, from any thread, also while it starts. False where that cannot be done."""
        ...

    def close(self) -> str:
        """Stop the engine if it still runs, wait for it, and say how it ended."""
        ...


class ThreadClient:
    """The engine in a thread of this process."""

    def __init__(self, factory: CoreFactory) -> None:
        self._factory = factory
        self._core: EngineCore | None = None
        self._thread: threading.Thread | None = None
        self._end = "it was stopped"

    def start(self, on_outputs: OnOutputs, on_death: OnDeath, *, timeout: float | None = None) -> EngineInfo:
        core = self._core = self._factory()

        def serve() -> None:
            try:
                core.run(on_outputs)
            except Exception as error:
                logger.exception("the engine died")
                self._end = type(error).__name__
                on_death()

        self._thread = threading.Thread(target=serve, name="engine", daemon=True)
        self._thread.start()
        return core.info

    def submit(self, message: ToRunning) -> None:
        core, thread = self._core, self._thread
        if core is None or thread is None or not thread.is_alive():
            raise EngineDeadError("the engine is not running")
        core.inbox.put(message)

    def cpu_seconds(self) -> float | None:
        return None if self._thread is None else _cpu_seconds(f"/proc/self/task/{self._thread.native_id}")

    def resident_bytes(self) -> int:
        return 0

    def kill(self) -> bool:
        return False

    def close(self) -> str:
        core, self._core = self._core, None  # its memory is wanted for the next one
        if core is not None and self._thread is not None:
            core.inbox.put(Shutdown())
            self._thread.join(THREAD_STOP_SECONDS)
        return self._end


class ProcessClient:
    """The engine in a process of its own, over a pair of pipes.

    `factory` must be importable by the child (a module-level function or a partial of one). Messages are msgpack; a
    writer thread encodes and sends them, since a request with pictures is larger than a pipe holds. The engine waits
    while nobody reads what it says, so that it never says more than a pipe holds.
    """

    def __init__(self, factory: CoreFactory) -> None:
        self._factory = factory
        self._outbox: SimpleQueue[ToEngine] = SimpleQueue()
        self._process: multiprocessing.process.BaseProcess | None = None
        self._threads: list[threading.Thread] = []
        self._closing = False
        self._killed = False
        self._gone = False

    def start(self, on_outputs: OnOutputs, on_death: OnDeath, *, timeout: float | None = None) -> EngineInfo:
        context = multiprocessing.get_context("spawn")
        child_reads, parent_writes = context.Pipe(duplex=False)
        parent_reads, child_writes = context.Pipe(duplex=False)
        log_level = "INFO" if logger.isEnabledFor(logging.INFO) else "WARNING"
        arguments = (self._factory, child_reads, child_writes, log_level, log_format())
        process = context.Process(target=_serve_in_child, args=arguments, name="engine", daemon=True)
        process.start()
        child_reads.close()
        child_writes.close()
        self._process = process
        if self._killed:
            process.kill()
        info = self._await_ready(parent_reads, timeout)
        self._threads = [
            threading.Thread(target=self._write, args=(parent_writes,), name="to-engine", daemon=True),
            threading.Thread(
                target=self._read, args=(parent_reads, on_outputs, on_death), name="from-engine", daemon=True
            ),
        ]
        for thread in self._threads:
            thread.start()
        return info

    def _await_ready(self, reads: Connection, timeout: float | None) -> EngineInfo:
        try:
            if not reads.poll(timeout):
                raise ConfigError(f"the engine process was not ready within {timeout:.0f} s")
            message = _DECODE_FROM_ENGINE.decode(reads.recv_bytes())
        except (EOFError, OSError):
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
        try:
            while True:
                message = _DECODE_FROM_ENGINE.decode(reads.recv_bytes())
                if isinstance(message, EngineOutputs):
                    on_outputs(message)
        except (EOFError, OSError):
            pass  # it has ended
        except Exception:
            logger.exception("the engine cannot be listened to")
            self.kill()
        self._gone = True
        if not self._closing:
            on_death()

    def submit(self, message: ToRunning) -> None:
        if not self._threads or self._gone or self._closing:
            raise EngineDeadError("the engine is not running")
        self._outbox.put(message)

    def cpu_seconds(self) -> float | None:
        return None if self._process is None else _cpu_seconds(f"/proc/{self._process.pid}")

    def resident_bytes(self) -> int:
        return 0 if self._process is None else _resident_bytes(f"/proc/{self._process.pid}")

    def kill(self) -> bool:
        self._killed = True
        if self._process is not None:
            self._process.kill()
        return True

    def close(self) -> str:
        self._closing = True
        if self._process is None:
            return "it was not started"
        if not self._threads:
            self._process.kill()  # still loading: nothing of it is worth waiting for
        self._outbox.put(Shutdown())
        self._process.join(PROCESS_STOP_SECONDS)
        if self._process.is_alive():
            if not self._killed:
                logger.warning("the engine did not stop within %g s; killing it", PROCESS_STOP_SECONDS)
            self._process.kill()
            self._process.join(DEAD_STOP_SECONDS)
        for thread in self._threads:
            thread.join(DEAD_STOP_SECONDS)
        return _describe_end(self._process.exitcode)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None


def _describe_end(exit_code: int | None) -> str:
    if exit_code is None:
        return "it cannot be ended"
    return f"it exited with {exit_code}" if exit_code >= 0 else f"{signal.Signals(-exit_code).name} ended it"


def _cpu_seconds(folder: str) -> float | None:
    """User and system time of a process or thread by its folder in /proc, and its main thread's wait for a processor.

    None where there is no such folder.
    """
    try:
        # The name before it is in parentheses and may hold anything.
        fields = Path(folder, "stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
        used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return None
    try:
        return used + int(Path(folder, "schedstat").read_text(encoding="ascii").split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return used  # a kernel that does not count that


def _resident_bytes(folder: str) -> int:
    """Main memory of a process by its folder in /proc; 0 where there is none."""
    try:
        return int(Path(folder, "statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


_ENCODE = msgspec.msgpack.Encoder().encode
_DECODE_FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
_DECODE_TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)


def _serve_in_child(
    factory: CoreFactory, reads: Connection, writes: Connection, log_level: str, log_format: LogFormat
) -> None:
    """The engine process: a reader thread keeps the pipe empty while the main thread steps."""
    # Ctrl-C reaches the whole foreground group; the parent decides when the engine stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    configure_logging(log_level, format=log_format)
    inbox: SimpleQueue[ToEngine | Prepared] = SimpleQueue()

    def read() -> None:
        while True:
            try:
                message = _DECODE_TO_ENGINE.decode(reads.recv_bytes())
            except (EOFError, OSError):
                # The parent is gone, and with it every reader of what a step would make.
                os._exit(1)
            inbox.put(message)
            if isinstance(message, Shutdown):
                return

    # Before anything is loaded: nobody may want it any more.
    threading.Thread(target=read, name="inbox", daemon=True).start()
    try:
        core = factory()
    except (ConfigError, CheckpointError) as error:
        writes.send_bytes(_ENCODE(EngineFailed(str(error))))
        return
    core.inbox = inbox
    writes.send_bytes(_ENCODE(core.info))
    status = BROKEN_STATUS
    try:
        core.run(lambda outputs: writes.send_bytes(_ENCODE(outputs)))
    except EngineBrokenError as error:
        logger.critical("the engine is broken and ends: %s", error)
    except BrokenPipeError:
        pass  # the parent is gone
    except Exception:
        logger.critical("the engine ends by an error that nothing has caught", exc_info=True)
    else:
        status = 0
    # At once: what is broken may also break, or hang, while it is taken down; what is whole takes half a second for it.
    logging.shutdown()
    os._exit(status)
