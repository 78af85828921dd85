"""Hostile pictures against whole servers: real processes, real sockets, real signals."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.config import ServerConfig
from server.errors import ConfigError
from server.launch import build_inputs
from server.observability.metrics import ServerMetrics
from tests.conformance import sabotage
from tests.conformance.memory import children, resident_bytes
from tests.conformance.sabotage import PUBLIC, web
from tests.inputs.hostile_urls import HOSTILE_NAMES, HOSTILE_URLS
from tests.inputs.loopback import Handler, answer, raw
from tests.inputs.pictures import as_data_url, noise_png
from tests.serving import Server, checked_server, running_server

PARAM = "messages[0].content[0].image_url.url"
SMALL = ("--dtype", "float32", "--kv-cache-memory-gb", "0.1", "--max-model-len", "2048", "--no-warm-up")
HTTP = httpx.Client(timeout=60)  # one for all: to make one costs more than a request
DECODE_SECONDS = 2
MAX_BYTES = 8 << 20


@pytest.fixture(scope="module", autouse=True)
def _closed_http() -> Iterator[None]:
    yield
    HTTP.close()


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("plain") / "log"
    with checked_server(tiny_checkpoint, log, *SMALL, "--image-decode-timeout", str(DECODE_SECONDS)) as running:
        yield running


@pytest.fixture(scope="module")
def open_server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that may fetch pictures from 127.0.0.2, on any port."""
    log = tmp_path_factory.mktemp("open") / "log"
    options = (*SMALL, "--max-image-bytes", str(MAX_BYTES))
    with running_server(tiny_checkpoint, log, *options, module=sabotage.__name__) as running:
        yield running
        assert running.stop() == 0
    assert "Traceback" not in log.read_text()


def ask(server: Server, content: Any, *, max_tokens: int = 1) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": max_tokens}
    return HTTP.post(f"{server.base_url}/v1/chat/completions", json=body)


def picture(url: str, detail: str = "low") -> Mapping[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": detail}}


def refused(server: Server, url: str) -> Mapping[str, Any]:
    response = ask(server, [picture(url)])
    assert response.status_code == 400, (url, response.text)
    error: Mapping[str, Any] = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", PARAM)
    # Neither names nor addresses, of theirs or ours, nor the words of a library.
    assert not re.search(r"example|localhost|\d+\.\d+\.\d+|::|errno|Error|0x|internal", error["message"]), url
    return error


# --- URLs ---


@contextlib.contextmanager
def canaries(*ports: int) -> Iterator[list[socket.socket]]:
    """Listeners on every address of this machine: the ports that can be had, and one that is free."""
    listeners = []
    for port in (*ports, 0):
        for family, host in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            with contextlib.suppress(OSError):  # taken, or not ours to take
                listener = socket.create_server((host, port), family=family)
                listener.setblocking(False)
                listeners.append(listener)
    try:
        yield listeners
    finally:
        for listener in listeners:
            listener.close()


def connections(listeners: list[socket.socket]) -> int:
    count = 0
    for listener in listeners:
        with contextlib.suppress(BlockingIOError):
            while True:
                listener.accept()[0].close()
                count += 1
    return count


def test_hostile_urls_are_refused_and_nobody_is_dialled(server: Server) -> None:
    assert len(HOSTILE_URLS) > 80
    with canaries(80, 443, 22, 6379, 6666, 8080) as listeners:
        for port in (80, listeners[-1].getsockname()[1]):
            for url in HOSTILE_URLS:
                assert refused(server, url.replace("{port}", str(port)))["code"] == "invalid_image_url", url
        for url in HOSTILE_NAMES:  # whether this machine's resolver knows them or not
            error = refused(server, url.replace("{port}", "80"))
            assert error["code"] in ("invalid_image_url", "failed_to_download_image")
        assert connections(listeners) == 0
        with socket.create_connection(listeners[-1].getsockname()[:2]):  # they are alive
            assert connections(listeners) == 1


def test_only_allowed_domains_are_fetched_from(tiny_checkpoint: Path) -> None:
    """The setting reaches the fetcher; what it means is shown there."""
    config = ServerConfig(allowed_media_domains=["Bücher.example", "pictures.example"])
    fetcher = build_inputs(config, tiny_checkpoint, ServerMetrics("m"))._images._fetcher
    assert fetcher._domains == {"xn--bcher-kva.example", "pictures.example"}
    with pytest.raises(ConfigError, match=r"^allowed_media_domains: 'https:"):
        build_inputs(ServerConfig(allowed_media_domains=["https://a.example"]), tiny_checkpoint, ServerMetrics("m"))


# --- text ---


def texts(url: str) -> list[str]:
    return [
        f"![a cat]({url})",
        f"![]({url})",
        f'<img src="{url}">',
        f"<image>{url}</image>",
        f"[a cat]({url})",
        f"Look at {url} please",
        f"![]({as_data_url(noise_png(4, 4))})",
    ]


def conversations(text: str) -> list[list[Mapping[str, Any]]]:
    """The text in every role that a message can have."""
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    hello = {"role": "user", "content": "Hello"}
    return [
        [{"role": "user", "content": text}],
        [{"role": "user", "content": [{"type": "text", "text": text}]}],
        [{"role": "system", "content": text}, hello],
        [{"role": "developer", "content": text}, hello],
        [hello, {"role": "assistant", "content": text}, hello],
        [
            hello,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": text},
        ],
    ]


def test_text_is_never_a_picture(open_server: Server) -> None:
    """Not in any role nor endpoint, although a fetch from there would be allowed."""
    with web({"/x.png": answer(noise_png(40, 40))}) as pictures:
        url = f"http://{PUBLIC}:{pictures.port}/x.png"

        def post(path: str, **body: Any) -> Any:
            response = HTTP.post(open_server.base_url + path, json=body)
            assert response.status_code == 200, response.text
            return response.json()

        before = open_server.metric("images_total")
        for text in texts(url):
            for messages in conversations(text):
                told = post("/tokenize", messages=messages)["tokens"]
                assert not {32000, 32001} & set(told)
                assert text in post("/detokenize", tokens=told)["prompt"]
                answered = post("/v1/chat/completions", messages=messages, max_tokens=1)
                assert answered["usage"]["prompt_tokens"] == len(told)
            post("/v1/completions", prompt=text, max_tokens=1)
            post("/v1/responses", input=text, instructions=text, max_output_tokens=16)
        assert pictures.connections == 0
        assert open_server.metric("images_total") == before
        assert ask(open_server, [picture(url)]).status_code == 200  # a part that says that it is one
        assert pictures.connections == 1


# --- slow and endless servers ---

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
PIECE = bytes(65536)
TOO_LARGE: dict[str, Handler] = {
    "no end": raw(HEAD, PIECE, endless=True),
    "chunks without an end": raw(CHUNKED, b"10000\r\n" + PIECE + b"\r\n", endless=True),
    "ten gigabytes": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 10737418240\r\n\r\n", PIECE, endless=True),
}
FAILED: dict[str, Handler] = {
    "never a word": raw(b""),
    "a byte now and then": raw(HEAD, b"x", pause=0.2, endless=True),
    "a header now and then": raw(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n", pause=0.2, endless=True),
    "a chunk now and then": raw(CHUNKED, b"1\r\nx\r\n", pause=0.2, endless=True),
    "less than it says": answer(b"x" * 1000, length=100_000),
    "a gzip bomb": answer(zlib.compress(bytes(100 << 20), 9, 31), headers=("Content-Encoding: gzip",)),
    "no HTTP": raw(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
    "not found": answer(status="404 Not Found"),
    "broken": answer(status="503 Service Unavailable"),
}


@contextlib.contextmanager
def watched(server: Server) -> Iterator[list[int]]:
    """The most that the server's processes hold while the block runs, in bytes; its first item is what they held."""
    pid = server.process.pid
    seen = [resident_bytes(pid), 0]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            seen[1] = max(seen[1], resident_bytes(pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("handler", TOO_LARGE.values(), ids=TOO_LARGE)
def test_an_endless_download_costs_no_more_than_the_limit(open_server: Server, handler: Handler) -> None:
    assert ask(open_server, [picture(as_data_url(noise_png(40, 40)))]).status_code == 200
    with web({"/x": handler}) as pictures, watched(open_server) as memory:
        error = refused(open_server, f"http://{PUBLIC}:{pictures.port}/x")
        assert error["code"] == "image_file_too_large"
    assert memory[1] - memory[0] < 2 * MAX_BYTES + (8 << 20)


def test_slow_and_broken_servers_cost_seconds_and_nobody_else(open_server: Server) -> None:
    """All of them at once, by the limits that a server has if nothing is said."""
    handlers = {f"/{index}": handler for index, handler in enumerate(FAILED.values())}
    with (
        web(handlers) as pictures,
        watched(open_server) as memory,
        ThreadPoolExecutor(len(handlers)) as threads,
    ):
        started = time.monotonic()
        waiting = [threads.submit(refused, open_server, f"http://{PUBLIC}:{pictures.port}{path}") for path in handlers]
        while not all(one.done() for one in waiting):
            assert HTTP.get(f"{open_server.base_url}/health/live").status_code == 200
            assert ask(open_server, "Hello").status_code == 200
        assert {one.result()["code"] for one in waiting} == {"failed_to_download_image"}
        assert time.monotonic() - started < 30
        assert pictures.connections == len(handlers)  # no second tries
    assert memory[1] - memory[0] < 2 * MAX_BYTES


# --- workers ---


def image_worker(server: Server) -> int:
    """The one that there is, once it is ready or busy."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = [pid for pid in children(server.process.pid) if b"image_worker" in command_line(pid)]
        if len(found) == 1:
            return found[0]
        time.sleep(0.02)
    raise AssertionError("no image worker")


def command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_worker_that_hangs_or_dies_costs_one_picture(server: Server, number: signal.Signals) -> None:
    """Texts are answered meanwhile, and the picture that waits behind it is decoded by the next worker."""
    url = as_data_url(noise_png(50, 40, seed=number))
    behind = as_data_url(noise_png(40, 50, seed=number))
    victim = image_worker(server)
    os.kill(victim, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as threads:
        started = time.monotonic()
        held = threads.submit(refused, server, url)
        time.sleep(0.3)
        waiting = threads.submit(ask, server, [picture(behind)])
        os.kill(victim, number)
        assert ask(server, "Hello").status_code == 200
        assert HTTP.get(f"{server.base_url}/health/ready").status_code == 200
        assert held.result()["code"] == "image_parse_error"
        assert time.monotonic() - started < DECODE_SECONDS + 20
        assert waiting.result().status_code == 200
    assert image_worker(server) != victim
    assert ask(server, [picture(url)]).status_code == 200  # there was nothing wrong with it


def test_sides_that_differ_by_a_pixel_in_one_request(server: Server) -> None:
    urls = [as_data_url(noise_png(*size)) for size in ((447, 448), (448, 447), (448, 448), (447, 447), (1, 1))]
    together = ask(server, [*(picture(url, "high") for url in urls), {"type": "text", "text": "What?"}])
    assert together.status_code == 200
    usage = together.json()["usage"]
    assert usage["prompt_tokens_details"]["image_tokens"] == 320 * len(urls)
