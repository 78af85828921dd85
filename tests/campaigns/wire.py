"""One kept-alive connection to a server: bytes of a request out, an answer in. As cheap as a client can be."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import httptools


@dataclass
class Answer:
    """What came, as far as it came. `status` 0: nothing that HTTP knows."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    is_whole: bool = False

    @property
    def media_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0]


class Connection(asyncio.Protocol):
    """One exchange at a time, for as long as it `is_open`."""

    def __init__(self) -> None:
        self.answer = Answer()
        self.begun = asyncio.Event()  # set once some of an answer's body is here
        self._ended = asyncio.Event()
        self._closed = asyncio.Event()
        self._has_body = True

    @classmethod
    async def open(cls, host: str, port: int) -> Connection:
        """Raises OSError."""
        _, connection = await asyncio.get_running_loop().create_connection(cls, host, port)
        return connection

    @property
    def is_open(self) -> bool:
        return not self._closed.is_set() and not self._transport.is_closing()

    async def exchange(self, pieces: Sequence[bytes], *, pause: float = 0.0, has_body: bool = True) -> Answer:
        """Send all pieces, `pause` seconds apart, and wait for the answer or for the end of the connection.

        After a cancellation the connection is to be closed. `has_body` False: the answer's head is all of it.
        """
        self.answer, self.begun, self._ended = Answer(), asyncio.Event(), asyncio.Event()
        self._has_body = has_body
        self._parser = httptools.HttpResponseParser(self)
        for index, piece in enumerate(pieces):
            if index and pause:
                await asyncio.sleep(pause)
            if not self.is_open:
                break
            self._transport.write(piece)
        if self._closed.is_set():
            return self.answer
        await self._ended.wait()
        return self.answer

    async def close(self) -> None:
        """At once, whatever has not been sent."""
        self._transport.abort()
        await self._closed.wait()

    # -- from the event loop -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._closed.set()
        self._ended.set()

    # -- from the parser -----------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        self.answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.answer.status = self._parser.get_status_code()
        if not self._has_body:
            self._end()
            self._transport.abort()  # the parser waits for a body

    def on_body(self, body: bytes) -> None:
        self.answer.body += body
        self.begun.set()

    def on_message_complete(self) -> None:
        if self.answer.status >= 200:  # else the answer is still to come
            self._end()
            if not self._parser.should_keep_alive():
                self._transport.close()

    def _end(self) -> None:
        self.answer.is_whole = True
        self._ended.set()


class Line:
    """A connection that is opened again whenever it has been closed; a context, which closes it."""

    def __init__(self, connect: Callable[[], Awaitable[Connection]]) -> None:
        self._connect = connect
        self._connection: Connection | None = None

    async def open(self) -> Connection:
        if self._connection is None or not self._connection.is_open:
            self._connection = await self._connect()
        return self._connection

    async def __aenter__(self) -> Line:
        return self

    async def __aexit__(self, *failure: object) -> None:
        if self._connection is not None:
            await self._connection.close()


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
