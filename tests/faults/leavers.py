"""Clients that leave, at every stage of a request, and clients that read too slowly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections.abc import Mapping
from typing import Any

import httpx

from tests.conformance import sabotage
from tests.faults.bench import (
    CHAT,
    Row,
    Workbench,
    ask,
    chat,
    children,
    clients,
    median,
    milliseconds,
    open_files,
    quantile,
    status_field,
)
from tests.inputs.pictures import as_data_url, noise_png
from tests.serving import Server

ROUNDS = 63  # of 16 kinds: about a thousand leavers
STORM_SECONDS = 60.0
STORM_CLIENTS = 500


def _request(body: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """Head and body of a chat request."""
    content = json.dumps(body).encode()
    lines = (f"POST {CHAT} HTTP/1.1", "host: a", "content-type: application/json", f"content-length: {len(content)}")
    return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n", content


class Connection:
    """A socket that says what it is told to, and leaves when it is told to."""

    def __init__(self, server: Server) -> None:
        self._host, self._port = server.base_url.removeprefix("http://").split(":")

    async def open(self) -> None:
        self.reader, self._writer = await asyncio.open_connection(self._host, int(self._port))

    async def send(self, body: Mapping[str, Any], *, share: float = 1.0) -> None:
        """A chat request, or only the first `share` of its body."""
        head, content = _request(body)
        self._writer.write(head + content[: int(share * len(content))])
        await self._writer.drain()

    async def until_events(self, count: int) -> None:
        for _ in range(count):
            await self.reader.readuntil(b"data: ")

    def leave(self) -> None:
        """Without a word, as a process that is killed does: unread data makes it a reset."""
        self._writer.transport.abort()


async def disconnect(bench: Workbench) -> list[Row]:
    """About a thousand clients that leave at eight stages, streaming and not."""

    async def forever(request: Any, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(30)

    with sabotage.web({"/slow.png": forever}) as origin, bench.sabotaged_server("--max-num-seqs", "4") as server:
        slow_url = f"http://pictures.example:{origin.port}/slow.png"
        async with clients(server) as http:
            for round_number in range(3):  # pools of threads and connections fill up once
                await _one_round(server, http, slow_url, random.Random(-round_number), waits=[])
            before = await _idle_state(server, http)
            waits: list[float] = []
            for round_number in range(ROUNDS):
                await _one_round(server, http, slow_url, random.Random(round_number), waits)
            after = await _idle_state(server, http)
    names = ("running and waiting", "KV blocks in use", "open files", "threads", "children")
    rows = [
        Row(f"{len(waits)} clients left: {name}", f"{one} as before, 2 more at most", str(other), other <= one + 2)
        for name, one, other in zip(names, before, after, strict=True)
    ]
    limit = 0.1 + 0.5  # and a step, on two busy cores
    worst = quantile(waits, 0.99)
    rows.append(
        Row("from leaving to nothing running or waiting, p99", f"under {limit:g} s", milliseconds(worst), worst < limit)
    )
    return rows


async def _one_round(
    server: Server, http: httpx.AsyncClient, slow_url: str, chance: random.Random, waits: list[float]
) -> None:
    """One client for each stage and for each way of answering, one after the other."""
    picture = {"type": "image_url", "image_url": {"url": as_data_url(noise_png(900, 900, seed=chance.randrange(9**9)))}}
    remote = {"type": "image_url", "image_url": {"url": slow_url}}
    words = f"{chance.random()} " * 400
    for stream in (False, True):
        for stage in ("upload", "fetch", "decode", "queue", "prefill", "first", "middle", "last"):
            content: Any = words if stage == "prefill" else f"{chance.random()}"
            if stage in ("fetch", "decode"):
                content = [remote if stage == "fetch" else picture]
            tokens = {"middle": 200, "last": 3}.get(stage, 30)
            body = chat(content, max_tokens=tokens, stream=stream)
            others = [await _opened(server, chat("o", max_tokens=300)) for _ in range(4 if stage == "queue" else 0)]
            leaver = Connection(server)
            await leaver.open()
            await leaver.send(body, share=0.5 if stage == "upload" else 1.0)
            if stream and stage in ("first", "middle", "last"):
                await leaver.until_events({"first": 1, "middle": 8, "last": 3}[stage])
            else:
                await asyncio.sleep(chance.uniform(0, 0.06))
            for connection in (leaver, *others):
                connection.leave()
            waits.append(await _until_idle(http))


async def _opened(server: Server, body: Mapping[str, Any]) -> Connection:
    connection = Connection(server)
    await connection.open()
    await connection.send(body)
    return connection


async def _until_idle(http: httpx.AsyncClient) -> float:
    """Seconds until nothing runs, waits or is being prepared."""
    started = time.perf_counter()
    while (await http.get("/load")).json()["server_load"]:
        await asyncio.sleep(0.005)
    return time.perf_counter() - started


async def _idle_state(server: Server, http: httpx.AsyncClient) -> tuple[int, int, int, int, int]:
    await asyncio.sleep(2)  # closed sockets linger, helpers are replaced
    pid = server.process.pid
    load = (await http.get("/load")).json()["server_load"]
    blocks = await asyncio.to_thread(server.metric, "kv_cache_usage_perc")
    return load, int(blocks > 0), open_files(pid), status_field(pid, "Threads"), len(children(pid))


async def storm(bench: Workbench) -> list[Row]:
    """Hundreds of clients that open a stream, read one event and leave, beside five that read to the end."""
    with bench.server("--max-num-seqs", "16", "--max-num-queued-reqs", "2000") as server:
        async with clients(server) as http:
            alone = await _honest(http, 15.0)
            stop = asyncio.Event()
            storming = [asyncio.create_task(_leaver(server, stop)) for _ in range(STORM_CLIENTS // 10)]
            await asyncio.sleep(5)
            memory = status_field(server.process.pid, "VmRSS")
            began = time.perf_counter()
            beside = await _honest(http, STORM_SECONDS)
            minutes = (time.perf_counter() - began) / 60
            growth = (status_field(server.process.pid, "VmRSS") - memory) / 1024 / minutes
            stop.set()
            left = sum(await asyncio.gather(*storming))
            await _until_idle(http)
    return [
        Row("clients that left after one event", "many", str(left), left >= STORM_CLIENTS),
        Row("honest clients' answers", "all whole", f"{beside[1]} of {beside[0]}", beside[0] == beside[1] > 0),
        Row(
            "honest clients' rate, alone and beside",
            "told (both are computed in the same steps)",
            f"{alone[1] / 15:.1f}/s, {beside[1] / STORM_SECONDS:.1f}/s",
            ok=True,
        ),
        Row("memory of the API process", "under 1 MB a minute", f"{growth:.2f} MB a minute", growth < 1),
    ]


async def _honest(http: httpx.AsyncClient, seconds: float) -> tuple[int, int]:
    """Requests sent by five clients, and those answered in full."""
    until = time.perf_counter() + seconds
    sent = whole = 0

    async def client() -> None:
        nonlocal sent, whole
        while time.perf_counter() < until:
            seen = await ask(http, chat(max_tokens=16, stream=True))
            sent += 1
            whole += seen.finished

    await asyncio.gather(*(client() for _ in range(5)))
    return sent, whole


async def _leaver(server: Server, stop: asyncio.Event) -> int:
    count = 0
    while not stop.is_set():
        connection = Connection(server)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await connection.open()
            await connection.send(chat(max_tokens=100, stream=True))
            await connection.until_events(1)
            connection.leave()
            count += 1
        await asyncio.sleep(0.05)
    return count


async def slow_readers(bench: Workbench) -> list[Row]:
    """200 clients that take ten bytes a second, and a few that read as fast as they can."""
    with bench.server("--max-num-seqs", "256", "--max-num-queued-reqs", "2000") as server:
        async with clients(server) as http:
            quick = chat(max_tokens=100, stream=True)
            alone = [gap for seen in await asyncio.gather(*(ask(http, quick) for _ in range(5))) for gap in seen.gaps]
            files = open_files(server.process.pid)
            memory = status_field(server.process.pid, "VmRSS")
            slow = [await _slow_connection(server) for _ in range(200)]
            readers = [asyncio.create_task(_read_slowly(connection)) for connection in slow]
            await _until_engine_idle(server)
            peak = status_field(server.process.pid, "VmRSS") - memory
            beside = [gap for seen in await asyncio.gather(*(ask(http, quick) for _ in range(5))) for gap in seen.gaps]
            began = time.perf_counter()
            # The server's side tells: what it had sent is read by its clients long after they have been cut off.
            while open_files(server.process.pid) > files and time.perf_counter() < began + 90:
                await asyncio.sleep(0.5)
            left = max(open_files(server.process.pid) - files, 0)
            seconds = time.perf_counter() - began
            for task in readers:
                task.cancel()
            await asyncio.gather(*readers, return_exceptions=True)
            for sock in slow:
                sock.close()
            idle = await _until_idle(http)
    ratio = quantile(beside, 0.99) / quantile(alone, 0.99)
    return [
        Row("memory for each slow reader", "under 256 KiB", f"{peak / 200:.0f} KiB", peak / 200 < 256),
        Row("slow readers cut off", "all 200 within 90 s", f"{200 - left} in {seconds:.0f} s", left == 0),
        Row("left of them", "nothing", f"idle after {idle:.1f} s", idle < 5),
        Row(
            "quick readers' gaps beside them, p99",
            "told (their answers are computed in the same steps)",
            f"{ratio:.2f} times (median {milliseconds(median(beside))})",
            True,
        ),
    ]


async def _slow_connection(server: Server) -> socket.socket:
    """A stream far longer than what kernels and proxies would hold for it, to a socket with a small window."""
    host, port = server.base_url.removeprefix("http://").split(":")
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, (host, int(port)))
    await loop.sock_sendall(sock, b"".join(_request(chat(max_tokens=300, stream=True, logprobs=True, top_logprobs=20))))
    return sock


async def _read_slowly(sock: socket.socket) -> None:
    """Until the server has had enough."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        while await loop.sock_recv(sock, 10):
            await asyncio.sleep(1)


async def _until_engine_idle(server: Server, seconds: float = 200.0) -> None:
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        if not await asyncio.to_thread(server.metric, "num_requests_running"):
            return
        await asyncio.sleep(0.5)
