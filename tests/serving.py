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
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
START_SECONDS = 120.0


@dataclass
class Server:
    """A running server. `log` is what it has printed so far, in a file."""

    process: subprocess.Popen[bytes]
    base_url: str
    log: Path

    def metric(self, name: str, labels: str = "") -> float:
        """Sum of a metric's samples whose labels contain `labels`."""
        text = httpx.get(f"{self.base_url}/metrics").text
        samples = re.findall(rf"^idefics2:{name}{{([^}}]*)}} (\S+)$", text, re.MULTILINE)
        assert samples, f"no metric {name}"
        return sum(float(value) for found, value in samples if labels in found)

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


def command(*args: str) -> list[str]:
    return [os.environ.get("SERVER_PYTHON", sys.executable), "-m", "server", *args]


def clean_environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("IDEFICS2_")}
    return {**kept, "HF_HUB_OFFLINE": "1", **changes}


@contextmanager
def running_server(folder: Path, log: Path, *args: str, **environment: str) -> Iterator[Server]:
    """Start `serve FOLDER ARGS` and wait until it is ready; end it by its own process id."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command("serve", str(folder), "--port", str(port), *args),
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
