"""Web servers on this machine for the image tests, down to the bytes that they send."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field


@dataclass
class Seen:
    """One request as it arrived."""

    target: str
    headers: dict[str, str]


Handler = Callable[[Seen, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class WebServer:
    """Answers each connection by the handler of its path; counts what came."""

    handlers: dict[str, Handler]
    port: int = 0
    connections: int = 0
    open_connections: int = 0
    most_open_connections: int = 0
    requests: list[Seen] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open_connections += 1
        self.most_open_connections = max(self.most_open_connections, self.open_connections)
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
                head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii").split("\r\n")
                headers = {}
                for line in head[1:-2]:
                    name, _, value = line.partition(":")
                    headers[name.lower()] = value.strip()
                seen = Seen(head[0].split(" ")[1], headers)
                self.requests.append(seen)
                answer = asyncio.ensure_future(self.handlers[seen.target.partition("?")[0]](seen, writer))
                gone = asyncio.ensure_future(reader.read())
                await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
                for task in (answer, gone):
                    task.cancel()
                await asyncio.gather(answer, gone, return_exceptions=True)
        finally:
            self.open_connections -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            self.tasks.discard(task)

    async def all_closed(self) -> None:
        """Wait until the other side has ended every connection."""
        async with asyncio.timeout(5):
            await asyncio.gather(*self.tasks)


@contextlib.asynccontextmanager
async def web_server(
    handlers: dict[str, Handler], *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[WebServer]:
    """A server on a free port; on leaving, waits until every connection has ended."""
    state = WebServer(handlers)
    listener = await asyncio.start_server(state.serve, host, 0, ssl=tls)
    state.port = listener.sockets[0].getsockname()[1]
    try:
        yield state
    finally:
        listener.close()
        await state.all_closed()


def answer(
    body: bytes = b"", *, status: str = "200 OK", headers: tuple[str, ...] = (), length: int | None = None
) -> Handler:
    """A handler that sends one whole answer and closes; `length` is what it claims, None the truth, -1 nothing."""

    async def handle(seen: Seen, writer: asyncio.StreamWriter) -> None:
        claimed = len(body) if length is None else length
        lines = [f"HTTP/1.1 {status}", *headers, "Connection: close"]
        if claimed >= 0:
            lines.append(f"Content-Length: {claimed}")
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await writer.drain()

    return handle


def redirect(location: str, *, status: str = "302 Found", headers: tuple[str, ...] = ()) -> Handler:
    return answer(status=status, headers=(f"Location: {location}", *headers))


def raw(*pieces: bytes, pause: float = 0.0, endless: bool = False) -> Handler:
    """A handler that sends these bytes as they are, the last again and again if `endless`, and then waits."""

    async def handle(seen: Seen, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)
        while endless:
            writer.write(pieces[-1])
            await writer.drain()
            await asyncio.sleep(pause)
        await asyncio.sleep(60)

    return handle
