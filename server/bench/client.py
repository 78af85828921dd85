"""A streaming HTTP/1.1 client that costs little: connections kept alive, bodies handed over as they arrive.

Knows HTTP and nothing of what is in a body. The load generator often shares a machine with the server it measures, so
its own cost is in every number. On the same stream of small events httpx takes 66 µs of CPU an event (108 without
uvloop) and this, with the C parser that uvicorn brings along, 10. The cheap path also stamps a whole burst of events,
one for each running request, before the first of them has aged.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast
from urllib.parse import urlsplit

import httptools

# An idle connection is not used again after this many seconds. Servers drop theirs after about five (uvicorn), and a
# request that meets the drop would count as failed.
IDLE_SECONDS = 2.0
CONNECT_SECONDS = 30.0
# How much of an error's body is kept for the message.
MAX_ERROR_BYTES = 16_384


class Sink(Protocol):
    """Takes the body of a 200 answer piece by piece; `now` is `time.perf_counter()` at arrival. Must not raise."""

    def feed(self, data: bytes, now: float) -> None: ...


@dataclass(frozen=True, slots=True)
class Response:
    """How an exchange ended. `body` is kept only when `status` is not 200: else the sink has had it."""

    status: int
    body: bytes


class _Connection(asyncio.Protocol):
    """One socket, one exchange at a time. The names without underscore are asyncio's and httptools' callbacks."""

    def __init__(self) -> None:
        self.idle_since = 0.0
        self.reusable = False
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[Response] | None = None
        self._sink: Sink | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._now = 0.0
        self._begin_answer()

    def _begin_answer(self) -> None:
        self._status = 0
        self._body = bytearray()
        self._has_length = False

    async def exchange(self, head: bytes, body: bytes, sink: Sink, *, timeout: float) -> Response:
        """Send one request and wait for the end of its answer.

        Raises OSError when the connection breaks and TimeoutError after `timeout` seconds without a byte.
        """
        if self._transport is None or self._transport.is_closing():
            raise ConnectionError("the connection was closed before the request was sent")
        self.reusable = False
        self._begin_answer()
        self._sink = sink
        self._now = time.perf_counter()
        self._waiter = asyncio.get_running_loop().create_future()
        self._check_silence(timeout)
        try:
            # Two writes would copy less, but one segment for a small request is what every other client sends.
            self._transport.write(head + body)
            return await self._waiter
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._waiter = self._sink = None
            self.idle_since = time.perf_counter()

    def _check_silence(self, timeout: float) -> None:
        # The timer is set again only when it rings, not for every event.
        left = self._now + timeout - time.perf_counter()
        if left > 0:
            self._timer = asyncio.get_running_loop().call_later(left, self._check_silence, timeout)
        else:
            self._fail(TimeoutError(f"nothing arrived for {timeout:g} s"))

    def close(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # TCP and TLS transports are read and written; uvloop's are so without being instances of asyncio's class.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(ConnectionError(f"not a valid HTTP answer: {error}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        if self._status and not self._has_length and exc is None:
            # HTTP/1.0 style: the end of the connection is the end of the body.
            self._finish()
        else:
            self._fail(ConnectionError("the connection was closed before the answer was complete"))

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._status == 200:
            if self._sink is not None:
                self._sink.feed(body, self._now)
        elif len(self._body) < MAX_ERROR_BYTES:
            self._body += body

    def on_message_complete(self) -> None:
        if self._status < 200:  # 100 and 103 come before the answer itself
            self._begin_answer()
            return
        # An answer that overtakes its request (413, say) leaves bytes unsent, which the next one would follow.
        is_sent = self._transport is not None and self._transport.get_write_buffer_size() == 0
        self.reusable = self._parser.should_keep_alive() and is_sent
        self._finish()

    def _finish(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(Response(self._status, bytes(self._body)))

    def _fail(self, error: Exception) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)


class StreamClient:
    """POSTs to one URL over as many connections as there are requests in flight. Close it, or use `async with`."""

    def __init__(self, url: str, *, headers: Mapping[str, str], timeout: float) -> None:
        """`timeout` is the longest silence in seconds, from the request on and between two pieces of its answer."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise ValueError(f"not an http(s) URL: {url}")
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._timeout = timeout
        self._idle: list[_Connection] = []
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        lines = {"Host": parts.netloc.rpartition("@")[2], "Content-Type": "application/json", **headers}
        self._head = f"POST {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())

    async def __aenter__(self) -> StreamClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
        await asyncio.sleep(0)  # lets the transports close their sockets

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def post(self, body: bytes, sink: Sink) -> Response:
        """One request; the sink is fed only when the status is 200. Raises OSError (TimeoutError is one)."""
        connection = self._take_idle() or await self._connect()
        try:
            head = f"{self._head}Content-Length: {len(body)}\r\n\r\n".encode("latin-1")
            return await connection.exchange(head, body, sink, timeout=self._timeout)
        finally:
            if connection.reusable:
                self._idle.append(connection)
            else:
                connection.close()

    def _take_idle(self) -> _Connection | None:
        # The most recently used one first: after a burst the others may grow old and go.
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and time.perf_counter() - connection.idle_since < IDLE_SECONDS:
                return connection
            connection.close()
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        except TimeoutError:
            raise TimeoutError(f"no connection within {CONNECT_SECONDS:g} s") from None
        return connection
