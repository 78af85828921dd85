"""How many connections there may be, and what happens to one more, in a process that may open few files."""

from __future__ import annotations

import contextlib
import resource
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from server.config import ServerConfig
from server.connections.listener import RESERVED_FILES, connection_limit, open_sockets
from server.errors import ConfigError
from tests.connections.serving import Address, connect, connected, error_of, head, process, read_all
from tests.listening import wait_until


def cpu_seconds(child: subprocess.Popen[str]) -> float:
    fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def metric(address: Address, name: str) -> float:
    with connect(address) as client:
        client.sendall(head("Connection: close", path="/metrics"))
        [line] = [line for line in read_all(client).decode().splitlines() if line.startswith(f"idefics2:{name}")]
    return float(line.rpartition(" ")[2])


@contextlib.contextmanager
def held(address: Address, count: int) -> Iterator[list[socket.socket]]:
    """So many connections that say nothing."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(address)) for _ in range(count)]


def is_healthy(address: Address) -> bool:
    with connect(address) as client:
        client.sendall(head())
        return client.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_one_more_connection_than_there_are_files_for() -> None:
    """It is told so, at no cost; the others are served, and so is it when one of them has left."""
    with process(num_files=256, header_timeout=600) as (address, child):
        limit = 256 - RESERVED_FILES - 3
        with held(address, limit) as clients:
            refused = []
            for _ in range(100):
                with connect(address) as client:
                    with contextlib.suppress(OSError):  # an answer may come before the question
                        client.sendall(head())
                    refused.append(read_all(client))
            for answer in refused:
                error = error_of(answer, 503)
                assert error["code"] == "too_many_connections"
                assert str(limit) in error["message"]
                assert b"\r\nretry-after: 1\r\n" in answer
            before = cpu_seconds(child)
            time.sleep(3)
            assert cpu_seconds(child) - before < 1
            clients[0].sendall(head())
            assert clients[0].recv(65536).startswith(b"HTTP/1.1 200 ")
            clients[1].close()
            wait_until(lambda: is_healthy(address), 20)
        wait_until(lambda: is_healthy(address), 20)
        assert metric(address, 'connections_refused_total{model_name="idefics2-8b",reason="limit"}') >= 100
        assert metric(address, "open_connections") == 1


def test_clients_understand_the_refusal() -> None:
    with process(max_connections=1, header_timeout=600) as (address, _), held(address, 1):
        for _ in range(20):
            answer = httpx.post(f"http://127.0.0.1:{address[1]}/v1/chat/completions", content=b"a" * 100_000)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_when_files_run_out_all_the_same() -> None:
    """Those who come wait without being asked for all the time, and are served when there are files again."""
    with process(num_files=64, max_connections=1000, header_timeout=600) as (address, child):
        with held(address, 80):
            time.sleep(0.5)
            before = cpu_seconds(child)
            time.sleep(2)
            assert cpu_seconds(child) - before < 0.7
        wait_until(lambda: is_healthy(address), 20)
        assert metric(address, 'connections_refused_total{model_name="idefics2-8b",reason="open_files"}') >= 1


def test_a_thousand_slow_clients_hold_up_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(1000, hard - 200)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count + 200), hard))
    try:
        with process(num_files=count + 400, header_timeout=2) as (address, _), held(address, count) as clients:
            assert is_healthy(address)  # the first answer of a server takes longer
            seconds = []
            for number, client in enumerate(clients):
                client.sendall(b"GET / HTTP/1.1\r\nX: ")
                if number % 10 == 0:
                    started = time.perf_counter()
                    assert is_healthy(address)
                    seconds.append(time.perf_counter() - started)
            with capsys.disabled():
                seconds.sort()
                print(f"\n{count} slow clients, /health/live: p50 {seconds[len(seconds) // 2] * 1e3:.1f} ms, ", end="")
                print(f"p99 {seconds[int(len(seconds) * 0.99)] * 1e3:.1f} ms")
            for client in clients:
                error_of(read_all(client), 408)
            wait_until(lambda: metric(address, "open_connections") == 1, 20)  # those that do not leave linger
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_are_counted_down_whatever_they_were() -> None:
    with connected(header_timeout=600) as server:
        for _ in range(50):
            with connect(server.address):
                pass  # gone before it was greeted
        with held(server.address, 20):
            wait_until(lambda: server.num_open == 20)
        wait_until(lambda: server.num_open == 0)


# -- at the start ----------------------------------------------------------------------------------------------------


def test_a_limit_that_is_set_is_the_limit() -> None:
    assert connection_limit(ServerConfig(max_connections=5)) == 5


def test_the_limit_follows_from_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServerConfig(image_workers=2)
    for num_files, expected in [(1024, 1024 - RESERVED_FILES - 6), (resource.RLIM_INFINITY, 1 << 20)]:
        monkeypatch.setattr(resource, "getrlimit", lambda _, found=num_files: (found, found))
        assert connection_limit(config) == expected
    monkeypatch.setattr(resource, "getrlimit", lambda _: (RESERVED_FILES + 6, 4096))
    with pytest.raises(ConfigError, match=rf"may open {RESERVED_FILES + 6} files and needs"):
        connection_limit(config)


def test_an_address_that_is_taken() -> None:
    [taken] = open_sockets("127.0.0.1", 0)
    with taken, pytest.raises(ConfigError, match=r"cannot listen on 127.0.0.1:\d+: Address already in use"):
        open_sockets("127.0.0.1", taken.getsockname()[1])


def test_no_such_address() -> None:
    for host in ("192.0.2.1", "host.invalid"):
        with pytest.raises(ConfigError, match=f"cannot listen on {host}:0: "):
            open_sockets(host, 0)


def test_all_addresses_of_a_name() -> None:
    sockets = open_sockets("localhost", 0)
    for each in sockets:
        each.close()
    assert sockets
