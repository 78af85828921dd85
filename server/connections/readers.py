"""Readers that do not read: what is written for them waits in memory, and closing their connection waits for them."""

from __future__ import annotations

import asyncio
import logging

logger = logging.getLogger(__name__)

# A reader must take so much in so long, or all that is left: about what a telephone line carried.
READ_SECONDS = 30.0
READ_BYTES = 16 << 10


class ReaderWatch:
    """Aborts a connection whose reader is too slow. To be started when nothing more is written until it has read."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._unread = 0

    def start(self) -> None:
        """Nothing happens if it is running, or if there is nothing to read."""
        size = self._transport.get_write_buffer_size()
        if size and self._timer is None:
            self._unread = size
            self._timer = self._loop.call_later(READ_SECONDS, self._check)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        self._timer = None
        size = self._transport.get_write_buffer_size()
        if size > max(self._unread - READ_BYTES, 0):
            logger.info("a client has read less than %d bytes in %g s and is cut off", READ_BYTES, READ_SECONDS)
            self._transport.abort()
        else:
            self.start()
