"""uvicorn's server around our listener and our protocol."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE

from server.connections.listener import Listener, connection_limit
from server.connections.protocol import HttpConnection, Patience

if TYPE_CHECKING:
    from server.config import ServerConfig
    from server.observability.metrics import ServerMetrics

logger = logging.getLogger(__name__)

CUT_SECONDS = 0.5  # what clients get to read the last event of a stream that was ended


class DrainingServer(uvicorn.Server):
    """Goes on listening after SIGTERM until `leave`: uvicorn would close its sockets at once, and raise the signal a
    second time.

    `leaving` is set by the first signal. SIGINT, or any second signal, is an order to leave `in_haste`; `exit_status`
    then is 128 and its number, as shells have it.
    """

    def __init__(
        self, app: Any, config: ServerConfig, *, metrics: ServerMetrics, tls: ssl.SSLContext | None = None
    ) -> None:
        """Raises ConfigError when there are too few files for connections."""
        super().__init__(
            uvicorn.Config(
                app,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
            )
        )
        self.leaving = asyncio.Event()
        self.in_haste = False
        self.exit_status = 0
        self._patience = Patience(head=config.header_timeout, body=config.body_timeout)
        self._max_connections = connection_limit(config)
        self._metrics = metrics
        self._tls = tls

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on these sockets, which are closed in the end."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        listening = sockets or []
        make_connection = functools.partial(
            HttpConnection,
            self.config,
            self.server_state,
            self.lifespan.state,
            patience=self._patience,
            metrics=self._metrics,
            is_leaving=self.leaving.is_set,
        )
        listener = Listener(
            listening,
            lambda on_lost: make_connection(on_lost=on_lost),
            max_connections=self._max_connections,
            tls=self._tls,
            handshake_seconds=self._patience.head,
            metrics=self._metrics,
        )
        self.servers = [listener]  # type: ignore[list-item]
        self.started = True
        scheme = "https" if self._tls else "http"
        for each in listening:
            host, port, *_ = each.getsockname()
            host = f"[{host}]" if ":" in host else host
            logger.info("listening on %s://%s:%d, up to %d connections", scheme, host, port, self._max_connections)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.leaving.is_set() or sig == signal.SIGINT:
            self.in_haste = True
            self.exit_status = 128 + sig
            if self.should_exit:
                self._cut()
        self.leaving.set()

    def leave(self, seconds: float) -> None:
        """Close the sockets, and give clients so long to read what they were sent, or to send what they have begun."""
        asyncio.get_running_loop().call_later(seconds, self._cut)
        self.should_exit = True

    def _cut(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield
