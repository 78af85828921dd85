"""Servers that are told to leave: by SIGTERM with streams open, by a second signal, and by Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from tests.faults.bench import (
    CHAT,
    Row,
    Seen,
    Workbench,
    ask,
    chat,
    children,
    clients,
    end_group,
    milliseconds,
)
from tests.serving import Server

NUM_STREAMS = 50
GRACE_SECONDS = 2.0  # beyond --shutdown-timeout, or after the signal that asks for haste


@dataclass
class Knocks:
    """What came back to those who came after the signal. Times are seconds since then."""

    at: list[float] = field(default_factory=list)
    chat: list[int] = field(default_factory=list)
    closing: bool = True  # the connection, they were told
    ready: set[int] = field(default_factory=set)
    live: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Departure:
    """`seconds` from the signal to the end of the process; `until` of each stream, from the signal to its end."""

    status: int
    seconds: float
    streams: list[Seen]
    until: list[float]
    knocks: Knocks


async def sigterm(bench: Workbench) -> list[Row]:
    """Streams of many lengths are open; then with too little time for the long ones, and clients that keep it up."""
    drained = await _leave(bench, range(100, 100 + 10 * NUM_STREAMS, 10), timeout=60.0)
    cut = await _leave(bench, range(100, 100 + 60 * NUM_STREAMS, 60), timeout=1.0, obstinate=True)
    return [*_judge("60 s to finish", drained, timeout=60.0), *_judge("1 s to finish", cut, timeout=1.0)]


async def _leave(bench: Workbench, lengths: Iterable[int], *, timeout: float, obstinate: bool = False) -> Departure:
    flags = ("--max-num-seqs", "64", "--shutdown-timeout", str(timeout))
    with bench.server(*flags, name=f"drain-{timeout:g}") as server:
        async with clients(server) as http, clients(server) as others, contextlib.AsyncExitStack() as stack:
            if obstinate:
                await stack.enter_async_context(_half_a_request(server))
                await stack.enter_async_context(_nobody_reads(server))
            streams, seen = await _open_streams(http, lengths)
            await others.get("/health/ready")
            signalled = time.perf_counter()
            server.process.send_signal(signal.SIGTERM)
            knocking = asyncio.create_task(_knock(others, signalled))
            status = await asyncio.to_thread(server.process.wait, timeout + 60)
            seconds = time.perf_counter() - signalled
            await streams
            until = [one.begun + one.total - signalled for one in seen]
            return Departure(status, seconds, seen, until, await knocking)


def _stream(length: int) -> dict[str, object]:
    return chat(f"Count to {length}.", max_tokens=length, stream=True, stream_options={"include_usage": True})


async def _open_streams(
    http: httpx.AsyncClient, lengths: Iterable[int]
) -> tuple[asyncio.Future[list[Seen]], list[Seen]]:
    """Streams of so many tokens, each of which has begun to speak; and what is to become of them."""
    bodies = [_stream(length) for length in lengths]
    seen = [Seen() for _ in bodies]
    streams = asyncio.gather(*(ask(http, body, seen=one) for body, one in zip(bodies, seen, strict=True)))
    async with asyncio.timeout(60):
        while any(math.isnan(one.first) for one in seen):
            await asyncio.sleep(0.01)
    return streams, seen


async def _knock(http: httpx.AsyncClient, since: float) -> Knocks:
    """Ask again and again until nobody listens any more. The first connection was there before, the others are new."""
    knocks = Knocks()
    with contextlib.suppress(httpx.TransportError):
        while True:
            paths = ("/health/ready", "/health/live")
            answer, ready, live = await asyncio.gather(
                http.post(CHAT, json=chat("Me too.")), *(http.get(path) for path in paths)
            )
            knocks.at.append(time.perf_counter() - since)
            knocks.chat.append(answer.status_code)
            knocks.closing &= answer.headers.get("connection") == "close"
            knocks.ready.add(ready.status_code)
            knocks.live.add(live.status_code)
            await asyncio.sleep(0.02)
    return knocks


@asynccontextmanager
async def _half_a_request(server: Server) -> AsyncIterator[None]:
    """A client that has sent the head of a request, and goes on to send its body, slowly."""
    host, port = server.base_url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n".encode())
    writer.write(b'content-length: 1000\r\n\r\n{"messages": ')
    try:
        await writer.drain()
        yield
    finally:
        writer.transport.abort()


@asynccontextmanager
async def _nobody_reads(server: Server) -> AsyncIterator[None]:
    """A client with a stream that it never reads, of more bytes than sockets hold."""
    host, port = server.base_url.removeprefix("http://").split(":")
    content = json.dumps(chat("Tell all.", max_tokens=4000, stream=True, logprobs=True, top_logprobs=20, n=1)).encode()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((host, int(port)))
        deaf.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n".encode())
        deaf.sendall(f"content-length: {len(content)}\r\n\r\n".encode() + content)
        yield


def _judge(case: str, left: Departure, *, timeout: float) -> list[Row]:
    whole = [one for one in left.streams if one.finished and not one.error]
    cut = [one for one in left.streams if one.error == "server_shutting_down"]
    done = sum(one.done for one in left.streams)
    broken = [one.error for one in left.streams if one not in whole and one not in cut]
    knocks = left.knocks
    first = knocks.at[0] if knocks.at else float("nan")
    going_on = sum(until > first for until in left.until)
    return [
        Row(
            f"{case}: {NUM_STREAMS} live streams",
            "whole, or ended with an error event; then [DONE]",
            f"{len(whole)} whole, {len(cut)} with an error event, {done} [DONE]",
            len(whole) + len(cut) == done == NUM_STREAMS and all(one.tokens for one in whole),
        ),
        Row(f"{case}: transport errors", "none", ", ".join(broken) or "none", not broken),
        Row(
            f"{case}: a new request",
            "503 within 100 ms of the signal, while others go on",
            f"{set(knocks.chat)}, {len(knocks.chat)} times; the first after {milliseconds(first)}, {going_on} going on",
            set(knocks.chat) == {503} and first <= 0.1 and going_on > 0,
        ),
        Row(
            f"{case}: connections of new requests",
            "told to close",
            "all told" if knocks.closing else "not all told",
            knocks.closing and bool(knocks.chat),
        ),
        Row(
            f"{case}: health meanwhile",
            "ready 503, live 200",
            f"ready {knocks.ready}, live {knocks.live}",
            knocks.ready == {503} and knocks.live == {200},
        ),
        _exit_row(case, left.status, 0, left.seconds, timeout + GRACE_SECONDS),
    ]


def _exit_row(case: str, status: int, expected: int, seconds: float, limit: float) -> Row:
    return Row(
        f"{case}: the process",
        f"exit status {expected} within {limit:g} s",
        f"{status} after {seconds:.2f} s",
        status == expected and seconds <= limit,
    )


async def second_signal(bench: Workbench) -> list[Row]:
    """Haste: whatever is going on ends with an error event, and the process is gone."""
    return [
        *await _hurry(bench, "SIGTERM twice", (signal.SIGTERM, signal.SIGTERM), 128 + signal.SIGTERM),
        *await _hurry(bench, "SIGTERM, then SIGINT", (signal.SIGTERM, signal.SIGINT), 128 + signal.SIGINT),
        *await _hurry(bench, "SIGINT", (signal.SIGINT,), 128 + signal.SIGINT),
        await _leave_while_loading(bench),
    ]


async def _hurry(bench: Workbench, case: str, numbers: tuple[signal.Signals, ...], expected: int) -> list[Row]:
    with bench.server("--max-num-seqs", "16", name=case.replace(", ", "-").replace(" ", "-")) as server:
        async with clients(server) as http, _half_a_request(server), _nobody_reads(server):
            streams, seen = await _open_streams(http, [20_000] * 8)
            helpers = children(server.process.pid)
            for number in numbers:
                await asyncio.sleep(0.5)
                signalled = time.perf_counter()
                server.process.send_signal(number)
            status = await asyncio.to_thread(server.process.wait, 60)
            seconds = time.perf_counter() - signalled
            await streams
    told = sum(one.error == "server_shutting_down" and one.done for one in seen)
    return [
        _exit_row(case, status, expected, seconds, GRACE_SECONDS),
        Row(f"{case}: 8 streams", "an error event and [DONE]", f"{told} so", told == 8),
        await _gone_row(case, helpers),
    ]


async def _gone_row(case: str, helpers: list[int]) -> Row:
    """Whatever the server had started must not outlive it."""
    await asyncio.sleep(0.5)
    left = [pid for pid in helpers if _is_running(pid)]
    return Row(f"{case}: its {len(helpers)} helpers", "gone 0.5 s later", f"{len(left)} left", not left)


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def _leave_while_loading(bench: Workbench) -> Row:
    server = bench.start(name="loading")
    try:
        async with asyncio.timeout(60), clients(server) as http:
            while not await _is_listening(http):
                await asyncio.sleep(0.05)
        signalled = time.perf_counter()
        server.process.send_signal(signal.SIGTERM)
        status = await asyncio.to_thread(server.process.wait, 60)
        return _exit_row("SIGTERM while the model loads", status, 0, time.perf_counter() - signalled, GRACE_SECONDS)
    finally:
        end_group(server)


async def _is_listening(http: httpx.AsyncClient) -> bool:
    try:
        return (await http.get("/health/live")).status_code == 200
    except httpx.TransportError:
        return False
