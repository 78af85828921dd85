"""Accepts connections: up to a limit, with a word to those beyond it, and without haste where open files run out.

Event loops' own servers know no limit, and when files run out they spin, close what they have just accepted, or stop
listening for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import resource
import socket
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from server.connections.answers import raw_answer
from server.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from server.config import ServerConfig
    from server.connections.protocol import HttpConnection
    from server.observability.metrics import ServerMetrics

logger = logging.getLogger(__name__)

# Files that this process opens besides its connections: about 30 when idle (standard streams, the loop, pipes to the
# engine and the grammar checkers), the checkpoint while it is read, and up to 32 downloads of pictures, each with a
# socket of its own and another for its name. And two pipes and a process for each image worker.
RESERVED_FILES = 128
FILES_PER_WORKER = 3
BACKLOG = 2048
ACCEPTS_AT_ONCE = 64  # then others get their turn on the loop
PAUSE_SECONDS = 0.25
# What the kernel keeps for a reader besides what is on its way: else megabytes, and a stream would be over before
# anybody could tell that nobody reads it.
UNSENT_BYTES = 128 << 10
TCP_NOTSENT_LOWAT = 25  # <linux/tcp.h>; Python has a name for it from 3.12 on
LOG_SECONDS = 60.0

_NO_FILES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def connection_limit(config: ServerConfig) -> int:
    """As configured, or what this process's limit of open files leaves. Raises ConfigError when that is nothing."""
    if config.max_connections is not None:
        return config.max_connections
    num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if num_files == resource.RLIM_INFINITY:
        return 1 << 20
    reserved = RESERVED_FILES + FILES_PER_WORKER * config.image_workers
    if num_files <= reserved:
        raise ConfigError(
            f"max_connections: this process may open {num_files} files and needs {reserved} besides its connections: "
            "raise the limit (ulimit -n)"
        )
    return num_files - reserved


def open_sockets(host: str, port: int) -> list[socket.socket]:
    """Listening sockets on every address of `host`. Raises ConfigError when there is none or one is taken."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((family, address) for family, *_, address in found):
            opened = socket.create_server(address, family=family, backlog=BACKLOG)
            sockets.append(opened)
            if sys.platform == "linux":  # what is accepted inherits it
                opened.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    except OSError as error:
        for opened in sockets:
            opened.close()
        raise ConfigError(f"host, port: cannot listen on {host}:{port}: {error.strerror}") from None
    return sockets


class Listener:
    """Stands where uvicorn would have one of asyncio's servers. Lives in one event loop."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        make_connection: Callable[[Callable[[], None]], HttpConnection],
        *,
        max_connections: int,
        tls: ssl.SSLContext | None,
        handshake_seconds: float,
        metrics: ServerMetrics,
    ) -> None:
        """`make_connection` is given what the connection calls when it has ended."""
        self._sockets = sockets
        self._make_connection = make_connection
        self._max_connections = max_connections
        self._tls = tls
        self._handshake_seconds = handshake_seconds
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._num_open = 0
        self._opening: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._logged = -LOG_SECONDS
        self._refusal = raw_answer(
            UnavailableError(f"all {max_connections} connections are in use", code="too_many_connections")
        )
        self._listen()

    def close(self) -> None:
        """Accept no more; those that are open stay so."""
        self._stop_listening()
        if self._pause is not None:
            self._pause.cancel()

    async def wait_closed(self) -> None:
        """Give up those that have not been greeted yet."""
        for task in self._opening:
            task.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)

    def _listen(self) -> None:
        self._pause = None
        for listening in self._sockets:
            listening.setblocking(False)
            self._loop.add_reader(listening, self._accept, listening)

    def _stop_listening(self) -> None:
        for listening in self._sockets:
            self._loop.remove_reader(listening)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                accepted, _ = listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in _NO_FILES:
                    return  # that client has left already
                # They wait in the kernel meanwhile; asking again at once would be all that this loop does.
                self._refused("open_files", f"no file for another connection ({error.strerror})")
                self._stop_listening()
                self._pause = self._loop.call_later(PAUSE_SECONDS, self._listen)
                return
            accepted.setblocking(False)
            if self._num_open >= self._max_connections:
                self._refuse(accepted)
            else:
                self._count(1)
                task = self._loop.create_task(self._open(accepted))
                self._opening.add(task)
                task.add_done_callback(self._opening.discard)

    async def _open(self, accepted: socket.socket) -> None:
        connection = self._make_connection(self._on_lost)
        try:
            await self._loop.connect_accepted_socket(
                lambda: connection,
                accepted,
                ssl=self._tls,
                ssl_handshake_timeout=self._handshake_seconds if self._tls else None,
            )
        except OSError:  # no TLS, none in time, or left: strangers do that all day
            if not connection.is_made:
                accepted.close()
        finally:
            if not connection.is_made:  # from then on it says itself when it ends
                self._on_lost()

    def _on_lost(self) -> None:
        self._count(-1)

    def _count(self, change: int) -> None:
        self._num_open += change
        self._metrics.record_connections(self._num_open)

    def _refuse(self, accepted: socket.socket) -> None:
        """Under TLS without a word: a handshake costs more than most requests, and that is what is short now."""
        with accepted, contextlib.suppress(OSError):
            if self._tls is None:
                accepted.send(self._refusal)
                accepted.shutdown(socket.SHUT_WR)
                accepted.recv(65536)  # what is left unread would turn the end into a reset
        self._refused("limit", f"all {self._max_connections} connections are in use")

    def _refused(self, reason: str, why: str) -> None:
        self._metrics.record_refused_connection(reason)
        now = time.monotonic()
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            logger.warning("new connections are refused: %s; said once in %g s", why, LOG_SECONDS)
