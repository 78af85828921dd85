"""Our server around an application, in a thread of the test's process or in a process of its own; and raw clients."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from server.api.app import build_app
from server.config import ServerConfig
from server.connections.listener import open_sockets
from server.connections.server import DrainingServer
from server.connections.tls import tls_context
from tests.api.scripted_llm import ScriptedLLM
from tests.listening import wait_until
from tests.observability.scrape import values

ROOT = Path(__file__).parents[2]
Address = tuple[str, int]


class ThreadServer(DrainingServer):
    """One that leaves the process's signals alone."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()


@dataclass
class Listening:
    address: Address
    llm: ScriptedLLM

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.address[1]}"

    def number(self, name: str) -> float:
        return values(self.llm.metrics)[name]

    @property
    def num_open(self) -> float:
        return self.number("open_connections")


@contextmanager
def connected(
    llm: ScriptedLLM | None = None, *, app: Any = None, keep_alive: float = 5.0, **settings: Any
) -> Iterator[Listening]:
    """The address of a server in a thread. Every connection must be gone soon after its clients are."""
    llm = llm or ScriptedLLM()
    config = ServerConfig(**settings)
    application = app or build_app(llm, config)  # type: ignore[arg-type]
    server = ThreadServer(application, config, metrics=llm.metrics, tls=tls_context(config))
    server.config.timeout_keep_alive = keep_alive  # type: ignore[assignment]
    server.config.timeout_graceful_shutdown = 1
    [listening] = open_sockets("127.0.0.1", 0)
    found = Listening(listening.getsockname(), llm)
    thread = threading.Thread(target=lambda: uvloop.run(server.serve([listening])))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield found
        wait_until(lambda: found.num_open == 0, 10)
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server does not stop"


@contextmanager
def process(*, num_files: int | None = None, **settings: Any) -> Iterator[tuple[Address, subprocess.Popen[str]]]:
    """The same in a process of its own, which may open so many files."""
    arguments = json.dumps({"num_files": num_files, "settings": settings})
    command = [sys.executable, "-m", "tests.connections.serving", arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            yield ("127.0.0.1", int(child.stdout.readline())), child
        finally:
            child.kill()


def connect(address: Address, *, timeout: float = 10, receive_buffer: int | None = None) -> socket.socket:
    made = socket.socket()
    made.settimeout(timeout)
    if receive_buffer is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    made.connect(address)
    return made


def read_all(client: socket.socket) -> bytes:
    """Until the server closes."""
    received = b""
    while piece := client.recv(65536):
        received += piece
    return received


def head(*lines: str, method: str = "GET", path: str = "/health/live") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *lines, "", ""]).encode()


def error_of(answer: bytes, status: int) -> dict[str, Any]:
    """The error object of an answer that is the last on its connection."""
    before, _, body = answer.rpartition(b"\r\n\r\n")
    first, *rest = before.rpartition(b"HTTP/1.1 ")[2].decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in rest)
    assert first.startswith(f"{status} "), answer
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    assert int(headers["content-length"]) == len(body)
    content = json.loads(body)
    assert set(content) == {"error"}
    assert set(content["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = content["error"]
    return error


def _main() -> None:
    import resource

    arguments = json.loads(sys.argv[1])
    if arguments["num_files"] is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (arguments["num_files"],) * 2)
    config = ServerConfig(**arguments["settings"])
    llm = ScriptedLLM()
    server = DrainingServer(build_app(llm, config), config, metrics=llm.metrics)  # type: ignore[arg-type]
    [listening] = open_sockets("127.0.0.1", 0)
    print(listening.getsockname()[1], flush=True)
    uvloop.run(server.serve([listening]))


if __name__ == "__main__":
    _main()
