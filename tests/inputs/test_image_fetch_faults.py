"""Servers and name servers that are slow, dead or in the way of others."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.errors import ClientError
from server.inputs import image_fetch
from server.inputs.image_fetch import ImageFetcher
from server.inputs.image_fetch_limits import HostBreaker, KeyShares
from tests.conformance.memory import resident_bytes
from tests.inputs.fetching import BODY, LOOPBACK, PARAM, Names, fetch_all, record_dials, refusal
from tests.inputs.loopback import Handler, Seen, WebServer, answer, raw, redirect

# What the loopback can hold between two processes, and what the allocator keeps.
SLACK_BYTES = 16 << 20


# --- slow ---


@pytest.mark.parametrize(
    "handler",
    [
        raw(b""),  # never a word
        raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x", pause=0.05, endless=True),  # a drip
        raw(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n", pause=0.05, endless=True),  # headers without an end
        raw(b"HTTP/1.1 103 Early Hints\r\n\r\n", pause=0.02, endless=True),
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", pause=0.05, endless=True),
    ],
)
def test_slow_servers_meet_the_deadline(handler: Handler) -> None:
    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        start = time.perf_counter()
        error = await refusal(fetcher.fetch(url + "/x", param=PARAM))
        assert 0.3 <= time.perf_counter() - start < 15
        assert error.code == "failed_to_download_image"
        assert "0.3 seconds" in error.message

    fetch_all({"/x": handler}, test, timeout=0.3)


@pytest.mark.parametrize(
    "handler",
    [
        raw(b""),
        raw(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n", pause=0.05, endless=True),
        raw(b"HTTP/1.1 103 Early Hints\r\n\r\n", pause=0.02, endless=True),
    ],
)
def test_the_head_of_an_answer_has_less_time_than_all_of_it(handler: Handler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_fetch, "_HEAD_SECONDS", 0.3)

    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        error = await refusal(fetcher.fetch(url + "/x", param=PARAM))
        assert (error.code, "within 0.3 seconds" in error.message) == ("failed_to_download_image", True)

    fetch_all({"/x": handler}, test, timeout=50.0)


HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


@pytest.mark.parametrize(
    "handler",
    [
        raw(HEAD),  # a head and no more
        raw(HEAD, b"x" * 10, pause=0.01, endless=True),  # 1 kB a second
        raw(HEAD, b"x" * 500_000),  # ten windows at once, and no more: what was fast once has no credit
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n", pause=0.01, endless=True),
    ],
)
def test_a_body_must_come_at_a_rate(handler: Handler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_fetch, "_SLOW_START_SECONDS", 0.3)

    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        error = await refusal(fetcher.fetch(url + "/x", param=PARAM))
        assert (error.code, "50000 bytes a second" in error.message) == ("failed_to_download_image", True)

    fetch_all({"/x": handler}, test, timeout=8.0)  # which is not what ends them


def test_a_body_that_comes_slowly_and_steadily_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """For longer than a window is long, at a rate that leaves a busy machine some room."""
    monkeypatch.setattr(image_fetch, "_SLOW_START_SECONDS", 0.0)
    monkeypatch.setattr(image_fetch, "_WINDOW_SECONDS", 2.5)
    monkeypatch.setattr(image_fetch, "_MIN_BYTES_PER_SECOND", 8_000)
    piece = b"x" * 20_000

    async def steadily(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
        for _ in range(30):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.1)

    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        started = time.perf_counter()
        assert await fetcher.fetch(url + "/x", param=PARAM) == piece * 30
        assert time.perf_counter() - started > 2.5

    fetch_all({"/x": steadily}, test, timeout=50.0)


def test_redirects_share_one_deadline() -> None:
    async def slow(seen: Seen, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.6)
        await redirect("/x")(seen, writer)

    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        error = await refusal(fetcher.fetch(url + "/x", param=PARAM))
        assert "1 seconds" in error.message
        assert server.connections == 2

    fetch_all({"/x": slow}, test, timeout=1.0)


# --- endless ---

ENDLESS: dict[str, Handler] = {
    "no length": raw(HEAD, b"x" * 65536, endless=True),
    "chunks without an end": raw(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n", endless=True
    ),
    "one chunk of 2^60 bytes": raw(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000000000000000\r\n", b"x" * 65536, endless=True
    ),
    "ten gigabytes of nothing": raw(
        b"HTTP/1.1 200 OK\r\nContent-Length: 10737418240\r\n\r\n", bytes(65536), endless=True
    ),
    "after a hint": raw(b"HTTP/1.1 103 Early Hints\r\n\r\n" + HEAD, b"x" * 65536, endless=True),
}


@pytest.mark.parametrize("handler", ENDLESS.values(), ids=ENDLESS)
def test_a_body_without_an_end_costs_no_more_than_the_limit(handler: Handler) -> None:
    limit = 8 << 20

    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        before = resident_bytes(os.getpid())
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, resident_bytes(os.getpid()))
                await asyncio.sleep(0.005)

        watching = asyncio.create_task(watch())
        error = await refusal(fetcher.fetch(url + "/x", param=PARAM))
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        assert error.code == "image_file_too_large"
        assert most - before < 2 * limit + SLACK_BYTES

    fetch_all({"/x": handler}, test, max_bytes=limit, timeout=30.0)


# --- dead ---


def test_a_resolver_that_hangs_or_knows_nothing() -> None:
    async def hang(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(60)
        return []

    async def nothing(host: str, port: int) -> Sequence[str]:
        return []

    async def unknown(host: str, port: int) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def failing(host: str, port: int) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")  # what SERVFAIL becomes

    for resolver in (hang, nothing, unknown, failing):

        async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
            error = await refusal(fetcher.fetch(url + "/x", param=PARAM))
            assert error.code == "failed_to_download_image"

        fetch_all({"/x": answer(BODY)}, test, resolver=resolver, timeout=0.3)


def test_nobody_listens() -> None:
    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        error = await refusal(fetcher.fetch(url + "/x", param=PARAM))
        assert error.code == "failed_to_download_image"

    fetch_all({}, test, resolver=Names({"pictures.example": ["127.0.0.7"]}))


@pytest.mark.parametrize(
    ("addresses", "dialled"),
    [
        (["127.0.0.7"], ["127.0.0.7"]),
        (["127.0.0.7"] * 9, ["127.0.0.7"]),
        (["127.0.0.7", "127.0.0.8", "127.0.0.9"], ["127.0.0.7", "127.0.0.8"]),
        (["127.0.0.7", "127.0.0.8", "::1"], ["127.0.0.7", "::1"]),  # the other family, which may lead somewhere
    ],
)
def test_one_other_address_is_tried(addresses: list[str], dialled: list[str]) -> None:
    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        seen = record_dials()
        assert (await refusal(fetcher.fetch(url + "/x", param=PARAM))).code == "failed_to_download_image"
        assert [host for host, _ in seen] == dialled

    networks = [LOOPBACK, ipaddress.ip_network("::1/128")]
    fetch_all({}, test, resolver=Names({"pictures.example": addresses}), extra_networks=networks)


def test_a_redirect_gets_no_second_try_of_its_own() -> None:
    names = Names({"pictures.example": ["127.0.0.7", "127.0.0.1"], "dead.example": ["127.0.0.8", "127.0.0.9"]})

    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        server.handlers["/x"] = redirect(f"http://dead.example:{server.port}/")
        seen = record_dials()
        await refusal(fetcher.fetch(url + "/x", param=PARAM))
        assert [host for host, _ in seen] == ["127.0.0.7", "127.0.0.1", "127.0.0.8"]

    fetch_all({}, test, resolver=names)


ORIGIN = """
import http.server, os, time
class Picture(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "200000")
        self.end_headers()
        self.wfile.write(b"x" * 100000)
        self.wfile.flush()
        time.sleep(0.3)
        self.wfile.write(b"x" * 100000)
    def log_message(self, *args): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Picture)
print(server.server_port, flush=True)
server.serve_forever()
"""


@contextmanager
def origin() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that serves pictures with a pause in the middle, and its port."""
    process = subprocess.Popen([sys.executable, "-c", ORIGIN], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_origin_is_killed_or_paused_in_mid_body(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_fetch, "_SLOW_START_SECONDS", 1.0)

    async def run() -> None:
        with origin() as (process, port):
            fetcher = ImageFetcher(1 << 20, 30.0, extra_networks=[LOOPBACK], extra_ports=[port])
            url = f"http://127.0.0.1:{port}/"
            assert len(await fetcher.fetch(url, param=PARAM)) == 200_000
            fetch = asyncio.create_task(fetcher.fetch(url, param=PARAM))
            await asyncio.sleep(0.1)
            process.send_signal(number)
            assert (await refusal(fetch)).code == "failed_to_download_image"
            if number == signal.SIGSTOP:  # as long as the kernel still takes connections for it
                monkeypatch.setattr(image_fetch, "_HEAD_SECONDS", 0.3)
                assert "did not answer" in (await refusal(fetcher.fetch(url, param=PARAM))).message
                process.send_signal(signal.SIGCONT)
                monkeypatch.setattr(image_fetch, "_HEAD_SECONDS", 20.0)
                assert len(await fetcher.fetch(url, param=PARAM)) == 200_000
            else:
                assert (await refusal(fetcher.fetch(url, param=PARAM))).code == "failed_to_download_image"

    asyncio.run(run())


# --- hosts that keep failing ---


def test_a_host_that_keeps_failing_is_left_alone_for_a_while() -> None:
    names = Names({"dead.example": ["127.0.0.7"], "pictures.example": ["127.0.0.1"]})

    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        now = 0.0
        fetcher._breaker = HostBreaker(clock=lambda: now)
        dead = f"http://dead.example:{server.port}/x"
        seen = record_dials()
        for _ in range(HostBreaker.MAX_FAILURES):
            assert "several times" not in (await refusal(fetcher.fetch(dead, param=PARAM))).message
        assert len(seen) == HostBreaker.MAX_FAILURES
        error = await refusal(fetcher.fetch(dead, param=PARAM))
        assert error.code == "failed_to_download_image"
        assert "several times in a row" in error.message
        assert len(seen) == HostBreaker.MAX_FAILURES
        assert await fetcher.fetch(url + "/x", param=PARAM) == BODY  # another host
        server.handlers["/to"] = redirect(dead)
        assert "several times" in (await refusal(fetcher.fetch(url + "/to", param=PARAM))).message
        dials = len(seen)
        await refusal(fetcher.fetch(dead, param=PARAM, key="another"))  # who has to find out for themselves
        assert len(seen) == dials + 1
        now += HostBreaker.OPEN_SECONDS
        names.names["dead.example"] = ["127.0.0.1"]
        assert await fetcher.fetch(dead, param=PARAM) == BODY

    fetch_all({"/x": answer(BODY)}, test, resolver=names)


def test_an_answer_of_any_kind_is_no_failure_of_the_host() -> None:
    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        for _ in range(2 * HostBreaker.MAX_FAILURES):
            await refusal(fetcher.fetch(url + "/404", param=PARAM))
            await refusal(fetcher.fetch(url + "/large", param=PARAM))
        assert await fetcher.fetch(url + "/x", param=PARAM) == BODY

    handlers = {"/404": answer(status="404 Not Found"), "/large": answer(b"x" * 100_000), "/x": answer(BODY)}
    fetch_all(handlers, test, max_bytes=50_000)


def test_breaker_counts_failures_in_a_row() -> None:
    now = 0.0
    breaker = HostBreaker(clock=lambda: now)

    def fail(times: int, host: str = "h") -> None:
        for _ in range(times):
            assert not breaker.is_open("", host)
            breaker.record_failure("", host)

    fail(HostBreaker.MAX_FAILURES - 1)
    breaker.record_success("", "h")
    fail(HostBreaker.MAX_FAILURES - 1)
    now += HostBreaker.WINDOW_SECONDS + 1  # long ago
    fail(HostBreaker.MAX_FAILURES)
    assert breaker.is_open("", "h")
    assert not breaker.is_open("key", "h")
    assert not breaker.is_open("", "g")
    now += HostBreaker.OPEN_SECONDS
    fail(1)  # still dead: one is enough
    assert breaker.is_open("", "h")
    breaker.record_success("", "h")  # of a fetch that was on its way
    assert not breaker.is_open("", "h")


def test_breaker_remembers_so_many_hosts() -> None:
    breaker = HostBreaker()
    for _ in range(HostBreaker.MAX_FAILURES):
        breaker.record_failure("", "first")
    for index in range(3 * HostBreaker.MAX_HOSTS):
        breaker.record_failure("", str(index))
    assert len(breaker._streaks) == HostBreaker.MAX_HOSTS
    assert not breaker.is_open("", "first")


# --- shares ---


def test_one_key_cannot_take_all_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_fetch, "_SLOW_START_SECONDS", 50.0)

    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        greedy = [asyncio.create_task(fetcher.fetch(f"{url}/hang?{i}", param=PARAM, key="greedy")) for i in range(9)]
        async with asyncio.timeout(20):
            while len(server.requests) < 2:
                await asyncio.sleep(0.01)
        for _ in range(3):
            assert await fetcher.fetch(url + "/x", param=PARAM, key="modest") == BODY
            assert await fetcher.fetch(url + "/x", param=PARAM) == BODY
        assert [seen.target[:5] for seen in server.requests].count("/hang") == 2
        for task in greedy:
            task.cancel()
        await asyncio.gather(*greedy, return_exceptions=True)
        assert fetcher._shares._shares == {}
        await server.all_closed()

    handlers = {"/hang": raw(b"HTTP/1.1 200 OK\r\n\r\n"), "/x": answer(BODY)}
    fetch_all(handlers, test, concurrency=4, timeout=50.0)


def test_shares_of_keys_and_of_those_without() -> None:
    async def run() -> None:
        async def most(key: str, total: int) -> int:
            shares = KeyShares(total)
            now = highest = 0

            async def use() -> None:
                nonlocal now, highest
                async with shares.hold(key):
                    now += 1
                    highest = max(highest, now)
                    await asyncio.sleep(0)
                    now -= 1

            await asyncio.gather(*(use() for _ in range(20)))
            assert shares._shares == {}
            return highest

        assert [await most("key", total) for total in (1, 2, 3, 8)] == [1, 1, 1, 4]
        assert [await most("", total) for total in (1, 2, 3, 8)] == [1, 2, 3, 8]

    asyncio.run(run())


def test_lookups_that_hang_count_as_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cannot be cancelled: however many names of one client lead to dead name servers, others find their own."""
    hanging = threading.Event()
    looked_up: list[str] = []
    look_up = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, **options: int) -> object:
        looked_up.append(host)
        if host.startswith("hang"):
            hanging.wait(60)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return look_up("127.0.0.1", port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        urls = [f"http://hang{index}.example:{server.port}/x" for index in range(4)]
        fetches = (fetcher.fetch(target, param=PARAM, key="greedy") for target in urls)
        outcomes = await asyncio.gather(*fetches, return_exceptions=True)
        assert all(isinstance(outcome, ClientError) for outcome in outcomes)
        # Two threads hang, though their fetches have long been given up, and there are no more than that.
        assert len([host for host in looked_up if host.startswith("hang")]) == 2
        assert await fetcher.fetch(url + "/x", param=PARAM, key="modest") == BODY
        hanging.set()
        while fetcher._system._shares._shares:
            await asyncio.sleep(0.01)
        assert await fetcher.fetch(url + "/x", param=PARAM, key="greedy") == BODY

    try:
        fetch_all({"/x": answer(BODY)}, test, resolver=None, concurrency=4, timeout=1.5)
    finally:
        hanging.set()


def test_a_process_does_not_wait_for_its_lookups() -> None:
    code = """
import asyncio, socket, time
from server.inputs.image_resolver import SystemResolver
socket.getaddrinfo = lambda *args, **options: time.sleep(120)
async def main():
    try:
        async with asyncio.timeout(0.1):
            await SystemResolver(2).resolve("h", 80, key="")
    except TimeoutError:
        print("left")
asyncio.run(main())
"""
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")
