"""A whole server where little is given: no home, nowhere to write, few files, and nobody who reads what it says."""

from __future__ import annotations

import array
import fcntl
import json
import os
import resource
import subprocess
import termios
import time
from pathlib import Path

import httpx

from tests.listening import wait_until
from tests.serving import ROOT, SMALL, START_SECONDS, Server, clean_environment, command, free_port

LONG = "x" * 180  # paths are logged up to 200 characters
BODY = {"messages": [{"role": "user", "content": "Go"}], "max_tokens": 200, "ignore_eos": True, "temperature": 0}


def chat(server: Server, **more: object) -> httpx.Response:
    return httpx.post(f"{server.base_url}/v1/chat/completions", json={**BODY, **more}, timeout=60)


def is_ready(server: Server) -> bool:
    assert server.process.poll() is None
    time.sleep(0.2)
    try:
        return httpx.get(f"{server.base_url}/health").status_code == 200
    except httpx.TransportError:
        return False


def waiting(descriptor: int) -> int:
    """Bytes in a pipe."""
    count = array.array("i", [0])
    fcntl.ioctl(descriptor, termios.FIONREAD, count)
    return count[0]


def test_a_server_with_nothing_but_its_model(tiny_checkpoint: Path) -> None:
    environment = clean_environment(PYTHONPATH=str(ROOT), PYTHONDONTWRITEBYTECODE="1")
    del environment["HOME"]
    reads, writes = os.pipe()
    fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, 1 << 16)
    port = free_port()
    process = subprocess.Popen(
        command("serve", str(tiny_checkpoint), "--port", str(port), *SMALL),
        cwd="/proc",  # where not even root can write
        env=environment,
        stdout=writes,
        stderr=writes,
    )
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (256, 256))
    os.close(writes)
    server = Server(process, f"http://127.0.0.1:{port}", Path(os.devnull))
    try:
        wait_until(lambda: is_ready(server), START_SECONDS)
        alone = chat(server).json()["choices"][0]["message"]["content"]
        with httpx.Client() as client:
            for _ in range(400):  # more than the pipe holds
                headers = {"x-request-id": "y" * 128}
                client.get(f"{server.base_url}/{LONG}", headers=headers)
        assert waiting(reads) > (1 << 16) - 4096, "the pipe is not full"
        # Nobody reads now, and all goes on: streams, whole answers, health, and the engine behind them.
        started = time.monotonic()
        streamed = chat(server, stream=True).text
        events = [
            json.loads(line.removeprefix("data: ")) for line in streamed.splitlines() if line.startswith("data: {")
        ]
        assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == alone
        assert chat(server).json()["choices"][0]["message"]["content"] == alone
        while time.monotonic() - started < 2:
            assert httpx.get(f"{server.base_url}/health/live", timeout=5).status_code == 200
            time.sleep(0.1)
        assert server.stop() == 0
        assert waiting(reads) > (1 << 16) - 4096
    finally:
        process.kill()
        process.wait()
        os.close(reads)
