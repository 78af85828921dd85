"""Logs: one line an event, with the id of the request that it belongs to. Never a prompt, never an answer.

A full pipe, a terminal on hold or a stuck disk blocks whoever writes to it. So a thread of its own does, and lines are
dropped when it lags behind, because a server without a log is better than none.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from queue import SimpleQueue
from typing import Literal

from server.errors import ConfigError
from server.observability.exposition import Number

LogFormat = Literal["text", "json"]

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
STDERR = 2
MAX_WAITING_BYTES = 1 << 20  # some ten thousand lines
FLUSH_SECONDS = 1.0

# Lines that were dropped, of all handlers of this process.
NUM_DROPPED = Number()

_request_id: ContextVar[str] = ContextVar("request_id", default="-")

# Libraries that write what they carry: the first logs every event that it sends, the rest URLs and headers.
_TALKATIVE = ("sse_starlette", "httpx", "httpcore", "asyncio", "PIL", "urllib3", "filelock")


@contextlib.contextmanager
def bind_request_id(request_id: str) -> Iterator[None]:
    """Lines that are logged inside carry this id, also those of tasks that are started inside."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


class OneLineFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO server.launch [request id] message`; line breaks, also a traceback's, as \\n."""

    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__(
            "%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s [%(request_id)s] %(message)s", "%Y-%m-%dT%H:%M:%S"
        )

    def format(self, record: logging.LogRecord) -> str:
        record.request_id = _request_id.get()
        return super().format(record).replace("\r", "\\r").replace("\n", "\\n")


class JsonFormatter(logging.Formatter):
    """An object a line: time, level, logger, request_id, message, and whatever the line was logged with as `fields`.

    A traceback is `exception`, in one string.
    """

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, object] = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "request_id": _request_id.get(),
            "message": record.getMessage(),
        }
        told |= getattr(record, "fields", {})
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


_FORMATTERS: dict[str, type[logging.Formatter]] = {"text": OneLineFormatter, "json": JsonFormatter}


class DroppingHandler(logging.Handler):
    """Writes lines to a file descriptor from a thread of its own, and drops those for which there is no room to wait.

    The descriptor is written to directly: a stream's lock, held by a thread that is stuck, would abort the interpreter
    at its end. At exit there is a second for what still waits.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()  # re-entrant: finalizers log too, anywhere
        self._num_taken = 0  # bytes; changed under the handler's lock
        self._num_written = 0  # bytes; changed by the thread
        self._num_dropped = 0
        threading.Thread(target=self._write_all, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self._line(record)
        except Exception:
            self.handleError(record)
            return
        if self._num_taken - self._num_written + len(line) > MAX_WAITING_BYTES:
            self._drop()
            return
        self._num_taken += len(line)
        self._lines.put(line)

    def flush(self) -> None:
        """Wait until all is written, but not for long."""
        deadline = time.monotonic() + FLUSH_SECONDS
        while self._num_written < self._num_taken and time.monotonic() < deadline:
            time.sleep(0.001)

    def close(self) -> None:
        self._lines.put(None)
        super().close()

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}\n".encode("utf-8", "backslashreplace")

    def _drop(self) -> None:
        self._num_dropped += 1
        NUM_DROPPED.value += 1

    def _write_all(self) -> None:
        num_told = 0
        while (line := self._lines.get()) is not None:
            is_read = self._write(line)
            self._num_written += len(line)
            if is_read and self._num_dropped > num_told and self._lines.empty():
                message = f"{self._num_dropped - num_told} lines were dropped, because nobody read the log"
                num_told = self._num_dropped
                notice = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "msg": message}
                self._write(self._line(logging.makeLogRecord(notice)))

    def _write(self, line: bytes) -> bool:
        rest = memoryview(line)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # whoever started us made it so
                select.select((), (self._descriptor,), ())
            except OSError:
                self._drop()  # the disk is full, or the pipe has no other end
                return False
        return True


def log_format() -> LogFormat:
    """What lines are written as now."""
    formatters = (handler.formatter for handler in logging.getLogger().handlers)
    return "json" if any(isinstance(formatter, JsonFormatter) for formatter in formatters) else "text"


def configure_logging(level: str = "INFO", *, format: LogFormat = "text") -> None:
    """Send everything to stderr in one format. Call before the first line; uvicorn with `log_config=None`."""
    if level.upper() not in _LEVELS:
        raise ConfigError(f"log level: must be one of {', '.join(_LEVELS)}")
    root = logging.getLogger()
    for before in root.handlers:
        if isinstance(before, DroppingHandler):
            before.flush()
            before.close()
    handler = DroppingHandler(STDERR)
    handler.setFormatter(_FORMATTERS[format]())
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.setLevel(logging.NOTSET)
    # Ours has the route, the status and the time, and knows of clients that left.
    logging.getLogger("uvicorn.access").disabled = True
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelNamesMapping()[level.upper()]))
