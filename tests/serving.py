"""A real server process on a loopback port, for tests."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
START_SECONDS = 120.0
SMALL = ("--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "8", "--kv-cache-memory-gb", "0.1")


@dataclass
class Server:
    """A running server. `log` is what it has printed so far, in a file; `headers` go with questions for metrics."""

    process: subprocess.Popen[bytes]
    base_url: str
    log: Path
    headers: dict[str, str] = field(default_factory=dict)

    def metric(self, name: str, labels: str = "") -> float:
        """Sum of a metric's samples whose labels contain `labels`."""
        text = httpx.get(f"{self.base_url}/metrics", headers=self.headers, timeout=60.0).text
        samples = re.findall(rf"^idefics2:{name}{{([^}}]*)}} (\S+)$", text, re.MULTILINE)
        assert samples, f"no metric {name}"
        return sum(float(value) for found, value in samples if labels in found)

    @property
    def engine_pid(self) -> int:
        """Of the process that its only engine runs in."""
        (pid,) = self.engine_pids
        return pid

    @property
    def engine_pids(self) -> list[int]:
        """Of the processes that its engines run in; the others that a server starts are of other kinds."""
        tasks = Path(f"/proc/{self.process.pid}/task")
        children = [int(pid) for file in tasks.glob("*/children") for pid in file.read_text().split()]
        return sorted(pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes())

    def wait_until_idle(self, seconds: float = 10.0) -> None:
        deadline = time.monotonic() + seconds
        while self.metric("num_requests_running") + self.metric("num_requests_waiting") > 0:
            assert time.monotonic() < deadline, "requests are still running"
            time.sleep(0.02)

    def stop(self, seconds: float = 30.0) -> int:
        """SIGTERM; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def command(*args: str, module: str = "server") -> list[str]:
    return [os.environ.get("SERVER_PYTHON", sys.executable), "-m", module, *args]


def clean_environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("IDEFICS2_")}
    return {**kept, "HF_HUB_OFFLINE": "1", **changes}


def make_checkpoint(folder: Path) -> Path:
    """A small model of random weights, written by the server's interpreter, which may be another than this one."""
    arguments = command("make-demo", str(folder), "--size", "tiny")
    subprocess.run(arguments, cwd=ROOT, env=clean_environment(), check=True, stdout=subprocess.DEVNULL, timeout=300)
    return folder


@contextmanager
def running_server(
    folder: Path | None, log: Path, *args: str, module: str = "server", **environment: str
) -> Iterator[Server]:
    """Start `serve FOLDER ARGS` and wait until it is ready; end it by its own process id. None: the bundled model."""
    port = free_port()
    model = [] if folder is None else [str(folder)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command("serve", *model, "--port", str(port), *args, module=module),
            cwd=ROOT,
            env=clean_environment(**environment),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@contextmanager
def checked_server(folder: Path, log: Path, *args: str) -> Iterator[Server]:
    """In the end nothing may be left running, cached blocks aside, and nothing broken."""
    with running_server(folder, log, *args) as server:
        yield server
        server.wait_until_idle()
        assert server.metric("kv_cache_usage_perc") == 0
        assert server.stop() == 0
    assert "Traceback" not in log.read_text()


def _wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client() as http:  # a client makes a TLS context, which costs more than the question
        while time.monotonic() < deadline:
            assert server.process.poll() is None, server.log.read_text()
            with contextlib.suppress(httpx.TransportError):
                if http.get(f"{server.base_url}/health").status_code == 200:
                    return
            time.sleep(0.1)
    raise AssertionError(f"not ready after {START_SECONDS:g} s: {server.log.read_text()}")
