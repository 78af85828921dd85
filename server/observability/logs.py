"""Logs: one line an event, with the id of the request that it belongs to. Never a prompt, never an answer."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar

from server.errors import ConfigError

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
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


def configure_logging(level: str = "INFO") -> None:
    """Send everything to stderr in one format. Call once, before the first line; uvicorn with `log_config=None`."""
    if level.upper() not in _LEVELS:
        raise ConfigError(f"log level: must be one of {', '.join(_LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter())
    root = logging.getLogger()
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
