"""Signals, and what a real server makes of them, beside those that let its streams finish (see test_server.py)."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import httpx

from tests.serving import ROOT, SMALL, clean_environment, command, free_port, running_server

CHAT = "/v1/chat/completions"


def test_a_second_signal_ends_what_is_running(tiny_checkpoint: Path, tmp_path: Path) -> None:
    body = {"messages": [{"role": "user", "content": "Go"}], "max_tokens": 1900, "ignore_eos": True, "stream": True}
    flags = (*SMALL, "--shutdown-timeout", "600")
    with (
        running_server(tiny_checkpoint, tmp_path / "log", *flags) as server,
        httpx.Client(base_url=server.base_url, timeout=60) as http,
        http.stream("POST", CHAT, json=body) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        while (answer := http.post(CHAT, json={**body, "max_tokens": 1})).status_code == 200:
            time.sleep(0.02)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "server_shutting_down"
        assert answer.headers["connection"] == "close"
        assert http.get("/health/ready").status_code == 503
        assert http.get("/health/live").status_code == 200
        server.process.send_signal(signal.SIGINT)
        *_, last, done = [line for line in lines if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "server_shutting_down"
        assert done == "data: [DONE]"
        assert server.process.wait(60) == 128 + signal.SIGINT


def test_a_signal_while_the_model_loads(tiny_checkpoint: Path, tmp_path: Path) -> None:
    port = free_port()
    with (
        subprocess.Popen(
            command("serve", str(tiny_checkpoint), "--port", str(port), *SMALL),
            cwd=ROOT,
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        seen = ""
        while "listening on" not in seen:
            seen += process.stdout.readline()
            assert process.poll() is None, seen
        process.terminate()
        rest = process.stdout.read()
        assert process.wait(60) == 0, rest
        assert "Traceback" not in rest
