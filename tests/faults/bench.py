"""What scenarios share: servers of their own, clients that record what they saw, and rows of a table."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.conformance import sabotage
from tests.serving import ROOT, Server, clean_environment, command, free_port, running_server

CHAT = "/v1/chat/completions"
SMALL = ("--dtype", "float32", "--kv-cache-memory-gb", "0.25")


@dataclass(frozen=True)
class Row:
    """One thing that must be so: `seen` is what was measured, in words."""

    what: str
    expected: str
    seen: str
    ok: bool


@dataclass
class Seen:
    """What one client saw of one request. Times are seconds; `first` and `total` count from `begun`."""

    begun: float = 0.0
    status: int = 0
    first: float = math.nan
    total: float = math.nan
    text: str = ""
    tokens: int = 0
    error: str = ""  # an error's code, or a transport error's name
    finished: bool = False  # with a finish reason, or whole
    done: bool = False  # [DONE] came
    retry_after: str = ""
    gaps: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Workbench:
    """A checkpoint and a folder for logs."""

    checkpoint: Path
    folder: Path

    @contextmanager
    def server(self, *args: str, name: str = "server", **environment: str) -> Iterator[Server]:
        with running_server(self.checkpoint, self.folder / f"{name}.log", *SMALL, *args, **environment) as server:
            yield server

    @contextmanager
    def sabotaged_server(self, *args: str) -> Iterator[Server]:
        """One that may fetch pictures from an address of this machine; all else is as it is."""
        log = self.folder / "sabotaged.log"
        with running_server(self.checkpoint, log, *SMALL, *args, module=sabotage.__name__) as server:
            yield server

    def start(self, *args: str, name: str, port: int | None = None) -> Server:
        """One that is neither waited for nor ended, with a process group of its own. A second one adds to the log."""
        port = port or free_port()
        log = self.folder / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                command("serve", str(self.checkpoint), "--port", str(port), *SMALL, *args),
                cwd=ROOT,
                env=clean_environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Server(process, f"http://127.0.0.1:{port}", log)


def end_group(server: Server) -> None:
    """Kill a server that was started with a group of its own, and whatever is left of that group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()


Scenario = Callable[[Workbench], Awaitable[list[Row]]]


@asynccontextmanager
async def clients(server: Server | str, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Of a server or an address. Without bounds of its own on connections, so that the server's are what is seen."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    base_url = server if isinstance(server, str) else server.base_url
    async with httpx.AsyncClient(base_url=base_url, limits=limits, timeout=120, trust_env=False, **options) as http:
        yield http


def chat(text: str = "Count.", *, max_tokens: int = 16, **fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": text}
    return {"messages": [message], "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, **fields}


async def ask(
    http: httpx.AsyncClient,
    body: Mapping[str, Any],
    *,
    headers: Mapping[str, str] | None = None,
    seen: Seen | None = None,
) -> Seen:
    """Send a chat request, streamed if it says so, and read its answer to whatever end it has.

    `seen` is filled on the way, for whoever wants to look at it meanwhile.
    """
    seen = seen or Seen()
    seen.begun = time.perf_counter()
    try:
        async with http.stream("POST", CHAT, json=dict(body), headers=headers) as answer:
            seen.status = answer.status_code
            seen.retry_after = answer.headers.get("retry-after", "")
            if answer.status_code != 200 or not body.get("stream"):
                await _read_whole(answer, seen)
            else:
                await _read_stream(answer, seen)
    except httpx.HTTPError as error:
        seen.error = type(error).__name__
    seen.total = time.perf_counter() - seen.begun
    return seen


async def _read_whole(answer: httpx.Response, seen: Seen) -> None:
    body = await answer.aread()
    seen.first = time.perf_counter() - seen.begun
    if answer.headers.get("content-type") != "application/json":  # of a proxy
        seen.error = answer.reason_phrase
        return
    content = json.loads(body)
    if answer.status_code == 200:
        choice = content["choices"][0]
        seen.text, seen.finished = choice["message"]["content"], choice["finish_reason"] is not None
        seen.tokens = content["usage"]["completion_tokens"]
    else:
        seen.error = content["error"]["code"]


async def _read_stream(answer: httpx.Response, seen: Seen) -> None:
    last = None
    async for line in answer.aiter_lines():
        if line == "data: [DONE]":
            seen.done = True
        if not line.startswith("data: ") or seen.done:
            continue
        event = json.loads(line[6:])
        if "error" in event:
            seen.error = event["error"]["code"]
            continue
        now = time.perf_counter()
        for choice in event["choices"]:
            if choice["delta"].get("content"):
                if last is None:
                    seen.first = now - seen.begun
                else:
                    seen.gaps.append(now - last)
                last = now
                seen.text += choice["delta"]["content"]
            seen.finished |= choice["finish_reason"] is not None
        if event.get("usage"):
            seen.tokens = event["usage"]["completion_tokens"]


async def gather(*work: Awaitable[Seen]) -> list[Seen]:
    return list(await asyncio.gather(*work))


def quantile(values: Sequence[float], share: float) -> float:
    """NaN of nothing."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else math.nan


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds < 0.1 else f"{seconds * 1000:.0f} ms"


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def status_field(pid: int, name: str) -> int:
    """A number of /proc/PID/status: Threads, or VmRSS in KiB."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise KeyError(name)


def children(pid: int) -> list[int]:
    """Pids of the processes that this one has started, from whichever thread."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(text) for text in (task / "children").read_text(encoding="utf-8").split()]
    return found
