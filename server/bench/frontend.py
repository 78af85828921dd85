"""What a token costs before it reaches its reader: the API process's processor time, over many streams at once.

`python -m server.bench.frontend` starts a server whose engine computes nothing and loads it; with `--base-url` and
`--pid` it loads any OpenAI-compatible server that counts `vllm:generation_tokens_total`, and accounts that process.
The clients read raw sockets and parse nothing, so that they take little of a shared machine. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

_TOKENS = re.compile(rb"^vllm:generation_tokens_total\S* (\S+)$", re.MULTILINE)
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_RECEIVE_BYTES = 1 << 18


@dataclass(frozen=True)
class Reading:
    """Where things stood at one moment; `cpu` is seconds of processor time of the API process."""

    time: float
    cpu: float
    tokens: float
    events: int


def main() -> int:
    args = _parse()
    if args.serve is not None:
        from server.bench.canned import serve_canned

        return serve_canned(port=args.serve, step_seconds=args.step_ms / 1000, max_num_seqs=args.streams)
    with contextlib.ExitStack() as stack:
        if args.base_url is None:
            args.base_url, args.pid = stack.enter_context(_own_server(args))
        report = _measure(args)
    print(json.dumps(report) if args.json else "  ".join(f"{name} {value:.5g}" for name, value in report.items()))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server.bench.frontend", description=__doc__)
    parser.add_argument("--streams", type=int, default=256, help="streams at once (default: 256)")
    parser.add_argument("--step-ms", type=float, default=20.0, help="beat of the canned engine (default: 20)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the measurement (default: 10)")
    parser.add_argument("--base-url", help="a server that runs already, without /v1")
    parser.add_argument("--pid", type=int, help="its API process")
    parser.add_argument("--model", default="", help="model to ask for")
    parser.add_argument("--max-tokens", type=int, default=3900, help="tokens of each answer (default: 3900)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if (args.base_url is None) != (args.pid is None):
        parser.error("--base-url and --pid go together")
    return args


@contextlib.contextmanager
def _own_server(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--serve", str(port), "--step-ms", str(args.step_ms), "--streams", str(args.streams)]
    process = subprocess.Popen([sys.executable, "-m", "server.bench.frontend", *flags], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit("the server ended before it was ready")
        with contextlib.suppress(OSError):
            if _get(url, "/health")[0] == 200:
                return
        time.sleep(0.1)
    raise SystemExit(f"the server is not ready after {seconds:g} s")


def _get(base_url: str, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(urlsplit(base_url).netloc, timeout=30)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


class Streams:
    """Open streams, read as fast as they come."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.num_events = 0
        self.num_started = 0
        self.num_ended = 0
        self._selector = selectors.DefaultSelector()
        self._request = _request(args)
        address = urlsplit(args.base_url)
        self._address = (address.hostname or "127.0.0.1", address.port or 80)

    def open(self, count: int) -> None:
        for _ in range(count):
            connection = socket.create_connection(self._address)
            connection.sendall(self._request)
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, data=[0])

    def read(self, until: float) -> None:
        """Read until time.monotonic() `until`."""
        while (left := until - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                connection = cast(socket.socket, key.fileobj)
                received = connection.recv(_RECEIVE_BYTES)
                events = received.count(b"data: ")
                if events and not key.data[0]:
                    self.num_started += 1
                key.data[0] += events
                self.num_events += events
                if not received or b"[DONE]" in received:
                    self.num_ended += 1
                    self._selector.unregister(connection)
                    connection.close()

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            cast(socket.socket, key.fileobj).close()


def _request(args: argparse.Namespace) -> bytes:
    body = json.dumps(
        {
            "model": args.model,
            "messages": [{"role": "user", "content": "Tell me a long story."}],
            "max_tokens": args.max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
    ).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _measure(args: argparse.Namespace) -> dict[str, float]:
    streams = Streams(args)
    try:
        streams.open(args.streams)
        while streams.num_started < args.streams:
            streams.read(time.monotonic() + 0.2)
        streams.read(time.monotonic() + 1.0)
        first = _read(args, streams)
        streams.read(time.monotonic() + args.seconds)
        last = _read(args, streams)
        if streams.num_ended:
            raise SystemExit(f"{streams.num_ended} streams ended during the measurement: raise --max-tokens")
    finally:
        streams.close()
    seconds, cpu, tokens = last.time - first.time, last.cpu - first.cpu, last.tokens - first.tokens
    return {
        "streams": args.streams,
        "tokens/s": tokens / seconds,
        "events/token": (last.events - first.events) / tokens,
        "API cores": cpu / seconds,
        "us/token": cpu / tokens * 1e6,
        "tokens/s/core": tokens / cpu,
    }


def _read(args: argparse.Namespace, streams: Streams) -> Reading:
    tokens = sum(float(value) for value in _TOKENS.findall(_get(args.base_url, "/metrics")[1]))
    return Reading(time.monotonic(), _cpu_seconds(args.pid), tokens, streams.num_events)


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process and its threads, from /proc."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND


if __name__ == "__main__":
    sys.exit(main())
