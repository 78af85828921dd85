from __future__ import annotations

import asyncio
import base64
import contextlib
import ipaddress
import random
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from server.errors import ClientError
from server.inputs.image_fetch import MAX_URL_LENGTH, ImageFetcher, is_public, parse_data_url
from tests.inputs.loopback import Handler, Seen, WebServer, answer, raw, redirect, web_server

PARAM = "messages[0].content[1].image_url.url"
BODY = bytes(range(256)) * 40
LOOPBACK = ipaddress.ip_network("127.0.0.0/8")
NAMES = {"pictures.example": ["127.0.0.1"], "inside.example": ["10.1.2.3"], "cloud.example": ["169.254.169.254"]}


class Names:
    """A resolver with made-up answers; asks the system about names it does not know. Counts the questions."""

    def __init__(self, names: dict[str, list[str]] | None = None) -> None:
        self.names = NAMES if names is None else names
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host in self.names:
            return self.names[host]
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [str(entry[4][0]) for entry in found]


@contextlib.asynccontextmanager
async def fetcher_for(server: WebServer, *, timeout: float = 10.0, **options: Any) -> AsyncIterator[ImageFetcher]:
    """A fetcher that may dial this machine, and only on the server's port besides 80 and 443."""
    options = {"resolver": Names(), "extra_networks": [LOOPBACK]} | options
    fetcher = ImageFetcher(options.pop("max_bytes", 1 << 20), timeout, extra_ports=[server.port], **options)
    try:
        yield fetcher
    finally:
        await fetcher.close()


def record_dials() -> list[tuple[str, int]]:
    """From now on, every connection that the running loop is asked to make."""
    loop = asyncio.get_running_loop()
    dialled: list[tuple[str, int]] = []
    connect = loop.create_connection

    async def recorded(factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        dialled.append((host, port))
        return await connect(factory, host, port, **options)

    loop.create_connection = recorded  # type: ignore[assignment, method-assign]
    return dialled


async def refusal(call: Awaitable[object]) -> ClientError:
    with pytest.raises(ClientError) as caught:
        await call
    error = caught.value
    assert (error.status, error.param) == (400, PARAM)
    # Neither names nor addresses, of theirs or ours.
    assert not re.search(r"example|localhost|\d+\.\d+\.\d+|::|errno|Error|0x", error.message)
    return error


def fetch_all(
    handlers: dict[str, Handler], test: Callable[[WebServer, ImageFetcher, str], Awaitable[None]], **options: Any
) -> None:
    """Run `test(server, fetcher, url of the server)`."""

    async def run() -> None:
        async with web_server(handlers) as server, fetcher_for(server, **options) as fetcher:
            async with asyncio.timeout(60):
                await test(server, fetcher, f"http://pictures.example:{server.port}")
        await asyncio.sleep(0.01)  # a body that was not read to its end is closed by tasks of the loop's own
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


# --- what is downloaded ---


def test_downloads_a_body() -> None:
    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        dialled = record_dials()
        target = "/a%2Fb/c.png?X-Amz-Signature=a%2Bb/c+d&x=[1]&y=%C3%A9~"
        assert await fetcher.fetch(f"{url}{target}#fragment", param=PARAM) == BODY
        assert dialled == [("127.0.0.1", server.port)]  # the address, not the name
        [seen] = server.requests
        assert seen.target == target
        assert seen.headers["host"] == f"pictures.example:{server.port}"
        assert seen.headers["accept-encoding"] == "identity"
        assert not {"cookie", "authorization", "referer"} & set(seen.headers)
        assert fetcher._resolve.asked == ["pictures.example"]  # type: ignore[attr-defined]

    fetch_all({"/a%2Fb/c.png": answer(BODY)}, test)


@pytest.mark.parametrize(
    "handler",
    [
        answer(BODY, length=-1),  # until the connection closes
        answer(BODY, headers=("Content-Encoding: identity",)),
        answer(BODY, headers=("Content-Type: text/html",)),
        raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2800\r\n", BODY, b"\r\n0\r\n\r\n"),
        raw(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.0 200 OK\r\nContent-Length: 10240\r\n\r\n", BODY),
    ],
)
def test_ways_to_send_a_body(handler: Handler) -> None:
    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        assert await fetcher.fetch(url + "/x", param=PARAM) == BODY

    fetch_all({"/x": handler}, test)


def test_upper_case_and_international_hosts() -> None:
    names = Names({"pictures.example": ["127.0.0.1"], "xn--bcher-kva.example": ["127.0.0.1"]})

    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        for host in ("PICTURES.Example", "bücher.example", "127.0.0.1"):
            assert await fetcher.fetch(f"HTTP://{host}:{server.port}/x", param=PARAM) == BODY
        assert names.asked == ["pictures.example", "xn--bcher-kva.example"]
        assert server.requests[1].headers["host"] == f"xn--bcher-kva.example:{server.port}"

    fetch_all({"/x": answer(BODY)}, test, resolver=names)


def test_the_system_resolves_names() -> None:
    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        loopbacks = [LOOPBACK, ipaddress.ip_network("::1/128")]
        own = ImageFetcher(1 << 20, 5.0, extra_ports=[server.port], extra_networks=loopbacks)
        assert await own.fetch(f"http://localhost:{server.port}/x", param=PARAM) == BODY
        error = await refusal(own.fetch(f"http://no-such-name.invalid:{server.port}/x", param=PARAM))
        assert error.code == "failed_to_download_image"
        await own.close()

    fetch_all({"/x": answer(BODY)}, test)


def test_tries_the_next_address() -> None:
    names = Names({"pictures.example": ["127.0.0.9", "127.0.0.9", "127.0.0.1"]})

    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        dialled = record_dials()
        assert await fetcher.fetch(url + "/x", param=PARAM) == BODY
        assert [host for host, _ in dialled] == ["127.0.0.9", "127.0.0.1"]

    fetch_all({"/x": answer(BODY)}, test, resolver=names)


def test_no_proxy_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        assert await fetcher.fetch(url + "/x", param=PARAM) == BODY

    fetch_all({"/x": answer(BODY)}, test)


# --- where it may connect to ---

# {port} is a port on which a canary listens on every address of this machine, and which the fetcher may use.
HOSTILE_URLS = [
    "http://127.0.0.1:{port}/",
    "http://127.0.0.1:{port}/?x=http://pictures.example/",
    "http://127.1:{port}/",
    "http://127.0.1:{port}/",
    "http://127.255.255.254:{port}/",
    "http://0:{port}/",
    "http://0.0.0.0:{port}/",
    "http://2130706433:{port}/",
    "http://017700000001:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://0x7f.1:{port}/",
    "http://0x7f000001:{port}/",
    "http://0x7F.0.0.0x1:{port}/",
    "http://127.0.0.01:{port}/",
    "http://127.0.0.1.:{port}/",
    "http://127。0。0。1:{port}/",
    "http://１２７.0.0.1:{port}/",
    "http://①②⑦.0.0.1:{port}/",
    "http://%31%32%37.0.0.1:{port}/",
    "http://127.0.0.1%00.pictures.example:{port}/",
    "http://[::1]:{port}/",
    "http://[0:0:0:0:0:0:0:1]:{port}/",
    "http://[::]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/",
    "http://[::127.0.0.1]:{port}/",
    "http://[64:ff9b::127.0.0.1]:{port}/",
    "http://[64:ff9b::a9fe:a9fe]/",
    "http://[2002:7f00:1::]:{port}/",
    "http://[2001:0:7f00:1::]:{port}/",
    "http://[fe80::1%25lo]:{port}/",
    "http://[fe80::1%lo]:{port}/",
    "http://[::ffff:169.254.169.254]/",
    "http://[fd00:ec2::254]/latest/",
    "http://[ff02::1]/",
    "http://[::1",
    "http://localhost:{port}/",
    "http://localhost.:{port}/",
    "http://LOCALHOST:{port}/",
    "http://169.254.169.254/latest/meta-data/",
    "http://2852039166/latest/meta-data/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://192.168.0.1/",
    "http://100.64.0.1/",
    "http://198.18.0.1/",
    "http://192.0.2.1/",
    "http://224.0.0.1/",
    "http://240.0.0.1/",
    "http://255.255.255.255/",
    "http://inside.example:{port}/",
    "https://inside.example/",
    "http://cloud.example/latest/meta-data/",
    "http://user@127.0.0.1:{port}/",
    "http://pictures.example@127.0.0.1:{port}/",
    "http://pictures.example:80@127.0.0.1:{port}/",
    "http://user:password@8.8.8.8/",
    "http://:@8.8.8.8/",
    "http://127.0.0.1:{port}\\@8.8.8.8/",
    "http:\\\\127.0.0.1:{port}\\",
    "http://8.8.8.8 &@127.0.0.1:{port}# @8.8.4.4/",
    "http://127.0.0.1:{port}\r\nHost: pictures.example",
    "http://127.0.0.1:{port}/\x00",
    "http://127.0.0.1\t:{port}/",
    " http://127.0.0.1:{port}/",
    "http://127.0.0.1:{port}/\u3000x",
    "http://8.8.8.8:22/",
    "http://8.8.8.8:8080/",
    "https://8.8.8.8:6379/",
    "http://8.8.8.8:99999/",
    "http://8.8.8.8:-80/",
    "file:///etc/passwd",
    "file://127.0.0.1/etc/passwd",
    "ftp://127.0.0.1:{port}/",
    "gopher://127.0.0.1:{port}/_GET",
    "javascript:alert(1)",
    "blob:http://127.0.0.1:{port}/",
    "unix:/var/run/docker.sock",
    "//127.0.0.1:{port}/",
    "127.0.0.1:{port}/",
    "/etc/passwd",
    "http:",
    "http:/127.0.0.1:{port}/",
    "http:///127.0.0.1:{port}/",
    "http:127.0.0.1:{port}/",
    "http://",
    "http://?",
    "http://.:{port}/",
    "http://a..b:{port}/",
    "http://-pictures.example/",
    "http://" + "a" * 64 + ".example/",
    "http://" + "a." * 127 + "example/",
    "http://a_\u200b.example/",
    "",
    "iVBORw0KGgo=",
    "http://pictures.example/" + "a" * MAX_URL_LENGTH,
]


def test_hostile_urls_are_refused_without_a_packet() -> None:
    async def run() -> None:
        handlers = {"/": answer(BODY)}
        async with web_server(handlers, host="0.0.0.0") as canary, web_server(handlers, host="::1") as canary_v6:
            ports = [canary.port, canary_v6.port]
            # No extra networks: this is the fetcher of production, but for two ports more and the invented names.
            fetcher = ImageFetcher(1 << 20, 5.0, resolver=Names(), extra_ports=ports)
            dialled = record_dials()
            for pattern in HOSTILE_URLS:
                for port in ports:
                    error = await refusal(fetcher.fetch(pattern.replace("{port}", str(port)), param=PARAM))
                    assert error.code == "invalid_image_url", pattern
            await fetcher.close()
            assert dialled == []
            assert canary.connections == canary_v6.connections == 0
            # The canary is alive: with its network allowed, the first URL of the table reaches it.
            open_fetcher = ImageFetcher(1 << 20, 5.0, extra_ports=ports, extra_networks=[LOOPBACK])
            assert await open_fetcher.fetch(f"http://127.0.0.1:{canary.port}/", param=PARAM) == BODY
            assert (canary.connections, len(dialled)) == (1, 1)
            await open_fetcher.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    "answers",
    [["127.0.0.1", "10.0.0.5"], ["10.0.0.5", "127.0.0.1"], ["127.0.0.1"] * 5 + ["169.254.169.254"], ["fe80::1%lo"]],
)
def test_one_private_answer_refuses_the_name(answers: list[str]) -> None:
    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        dialled = record_dials()
        assert (await refusal(fetcher.fetch(url + "/x", param=PARAM))).code == "invalid_image_url"
        assert dialled == []

    fetch_all({"/x": answer(BODY)}, test, resolver=Names({"pictures.example": answers}))


def test_a_name_that_changes_its_mind_is_asked_once() -> None:
    class Rebinding(Names):
        async def __call__(self, host: str, port: int) -> Sequence[str]:
            self.asked.append(host)
            return ["127.0.0.1"] if len(self.asked) == 1 else ["127.0.0.2"]

    names = Rebinding()

    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        dialled = record_dials()
        assert await fetcher.fetch(url + "/x", param=PARAM) == BODY
        assert names.asked == ["pictures.example"]
        assert dialled == [("127.0.0.1", server.port)]
        # Only 127.0.0.1 is allowed here, so a second question would have shown.
        assert (await refusal(fetcher.fetch(url + "/x", param=PARAM))).code == "invalid_image_url"
        assert len(dialled) == 1

    only = [ipaddress.ip_network("127.0.0.1/32")]
    fetch_all({"/x": answer(BODY)}, test, resolver=names, extra_networks=only)


@pytest.mark.parametrize("text", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(text: str) -> None:
    assert is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize(
    "text",
    [
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "100.64.0.1",
        "127.0.0.1",
        "169.254.1.1",
        "172.31.0.1",
        "192.0.0.1",
        "192.0.2.9",
        "192.168.1.1",
        "198.19.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.1.1.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::7f00:1",
        "::ffff:10.0.0.1",
        "::ffff:224.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b::169.254.169.254",
        "64:ff9b:1::1",
        "100::1",
        "2001::1",
        "2001:db8::1",
        "2002:808:808::",
        "2002:a00:1::",
        "fc00::1",
        "fd12::1",
        "fe80::1",
        "fec0::1",
        "ff02::1",
        "4000::1",
    ],
)
def test_addresses_that_are_not_public(text: str) -> None:
    assert not is_public(ipaddress.ip_address(text))


# --- redirects ---


def test_redirects_are_followed_three_times() -> None:
    handlers = {
        "/1": redirect("/2", headers=("Set-Cookie: a=b; Path=/",)),
        "/2": redirect("3?q=%20", status="301 Moved Permanently"),
        "/3": redirect("//pictures.example:{port}/4#x", status="307 Temporary Redirect"),
        "/4": answer(BODY),
        "/0": redirect("/1", status="308 Permanent Redirect"),
        "/loop": redirect("/loop", status="303 See Other"),
    }

    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        handlers["/3"] = redirect(f"//pictures.example:{server.port}/4#x", status="307 Temporary Redirect")
        assert await fetcher.fetch(url + "/1", param=PARAM) == BODY
        assert [seen.target for seen in server.requests] == ["/1", "/2", "/3?q=%20", "/4"]
        assert not any("cookie" in seen.headers or "referer" in seen.headers for seen in server.requests)
        for path in ("/0", "/loop"):
            before = server.connections
            error = await refusal(fetcher.fetch(url + path, param=PARAM))
            assert error.code == "failed_to_download_image"
            assert "3 times" in error.message
            assert server.connections == before + 4

    fetch_all(handlers, test)


@pytest.mark.parametrize(
    "location",
    [
        "http://10.0.0.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::1]:{port}/",
        "http://inside.example/",
        "//inside.example/",
        "http://2130706433:{port}/",
        "http://user@pictures.example:{port}/x",
        "http://pictures.example:22/",
        "http://pictures.example:{port}\\@inside.example/",
        "http://pictures.example:{port}/a b",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "gopher://pictures.example:{port}/",
        "http://[::1",
        "http://a_\u200b.example/",
        "/" + "a" * MAX_URL_LENGTH,
    ],
)
def test_redirects_are_checked_like_urls(location: str) -> None:
    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        server.handlers["/"] = redirect(location.replace("{port}", str(server.port)))
        dialled = record_dials()
        assert (await refusal(fetcher.fetch(url + "/", param=PARAM))).code == "invalid_image_url"
        assert len(dialled) == server.connections == 1

    fetch_all({}, test)


# --- what goes wrong on the way ---


@pytest.mark.parametrize(
    ("handler", "code", "told"),
    [
        (answer(status="404 Not Found"), "failed_to_download_image", "404"),
        (answer(BODY, status="500 Oops"), "failed_to_download_image", "500"),
        (answer(status="204 No Content", length=-1), "failed_to_download_image", "204"),
        (answer(BODY, status="206 Partial Content"), "failed_to_download_image", "206"),
        (answer(status="302 Found"), "failed_to_download_image", "302"),  # with no Location
        (answer(b""), "empty_image_file", ""),
        (answer(BODY, length=len(BODY) + 1), "failed_to_download_image", ""),
        (answer(BODY, headers=("Content-Encoding: gzip",)), "failed_to_download_image", "compressed"),
        (answer(BODY, headers=("Content-Encoding: br",)), "failed_to_download_image", "compressed"),
        (answer(b"x" * 70_000), "image_file_too_large", "65536"),
        (answer(b"x" * 70_000, length=-1), "image_file_too_large", "65536"),
        (answer(b"x", headers=("Content-Length: 7",)), "failed_to_download_image", ""),  # two lengths
        (raw(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), "failed_to_download_image", ""),
        (raw(b"HTTP/1.1 200 OK\r\nA: " + b"a" * 200_000), "failed_to_download_image", ""),
        (raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"), "failed_to_download_image", ""),
        (raw(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 8192, endless=True), "image_file_too_large", "65536"),
    ],
)
def test_bad_answers(handler: Handler, code: str, told: str) -> None:
    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        error = await refusal(fetcher.fetch(url + "/x", param=PARAM))
        assert error.code == code
        assert told in error.message
        assert server.connections == 1  # no second try

    fetch_all({"/x": handler}, test, max_bytes=65_536)


@pytest.mark.parametrize("size", [65_536, 65_537])
def test_the_byte_limit_is_exact(size: int) -> None:
    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        if size == 65_536:
            assert len(await fetcher.fetch(url + "/x", param=PARAM)) == size
        else:
            assert (await refusal(fetcher.fetch(url + "/x", param=PARAM))).code == "image_file_too_large"

    fetch_all({"/x": answer(b"x" * size)}, test, max_bytes=65_536)


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


def test_redirects_share_one_deadline() -> None:
    async def slow(seen: Seen, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.6)
        await redirect("/x")(seen, writer)

    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        error = await refusal(fetcher.fetch(url + "/x", param=PARAM))
        assert "1 seconds" in error.message
        assert server.connections == 2

    fetch_all({"/x": slow}, test, timeout=1.0)


def test_a_resolver_that_hangs_or_knows_nothing() -> None:
    async def hang(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(60)
        return []

    async def nothing(host: str, port: int) -> Sequence[str]:
        return []

    async def unknown(host: str, port: int) -> Sequence[str]:
        raise socket.gaierror(-2, "Name or service not known")

    for resolver in (hang, nothing, unknown):

        async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
            error = await refusal(fetcher.fetch(url + "/x", param=PARAM))
            assert error.code == "failed_to_download_image"

        fetch_all({"/x": answer(BODY)}, test, resolver=resolver, timeout=0.3)


def test_nobody_listens() -> None:
    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        error = await refusal(fetcher.fetch(url + "/x", param=PARAM))
        assert error.code == "failed_to_download_image"

    fetch_all({}, test, resolver=Names({"pictures.example": ["127.0.0.7"]}))


def test_garbage_of_every_kind_is_a_typed_error() -> None:
    rng = random.Random(3)
    good = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\nLocation: http://x/\r\n\r\n3\r\nabc"
    handlers: dict[str, Handler] = {}
    for index in range(60):
        data = bytearray(good)
        for _ in range(rng.randint(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        handlers[f"/{index}"] = raw(bytes(data))

    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        fetches = [fetcher.fetch(url + path, param=PARAM) for path in handlers]
        for outcome in await asyncio.gather(*fetches, return_exceptions=True):
            assert isinstance(outcome, ClientError | bytes)

    fetch_all(handlers, test, timeout=0.5, concurrency=60)


def test_downloads_at_once_are_bounded() -> None:
    async def slow(seen: Seen, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.3)
        await answer(BODY)(seen, writer)

    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        bodies = await asyncio.gather(*(fetcher.fetch(f"{url}/x?{index}", param=PARAM) for index in range(12)))
        assert bodies == [BODY] * 12
        assert server.most_open_connections == 3

    # Waiting for a slot is not the server's slowness: four rounds of 0.3 s fit a limit of 1 s for each.
    fetch_all({"/x": slow}, test, concurrency=3, timeout=1.0)


def test_cancelling_closes_the_connection() -> None:
    arrived = asyncio.Event()

    async def begin(seen: Seen, writer: asyncio.StreamWriter) -> None:
        arrived.set()
        await raw(b"HTTP/1.1 200 OK\r\n\r\n")(seen, writer)

    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        task = asyncio.create_task(fetcher.fetch(url + "/x", param=PARAM))
        await arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.all_closed()

    fetch_all({"/x": begin}, test)


# --- TLS ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for pictures.example that signs itself, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-subj", "/CN=pictures.example", "-addext", "subjectAltName=DNS:pictures.example", "-days", "2"),
            *("-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


def test_tls_is_verified_against_the_name(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    names_sent: list[str | None] = []
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(cert, key)
    server_side.sni_callback = lambda _, name, __: names_sent.append(name)
    trusting = ssl.create_default_context(cafile=str(cert))
    names = Names({"pictures.example": ["127.0.0.1"], "other.example": ["127.0.0.1"]})

    async def run() -> None:
        async with (
            web_server({"/x": answer(BODY)}, tls=server_side) as server,
            fetcher_for(server, tls=trusting, resolver=names) as fetcher,
            fetcher_for(server, resolver=names) as stranger,
        ):
            port = server.port
            assert await fetcher.fetch(f"https://pictures.example:{port}/x", param=PARAM) == BODY
            assert names_sent == ["pictures.example"]
            assert server.requests[0].headers["host"] == f"pictures.example:{port}"
            # Another name at the same address, right after: neither the certificate nor an old connection will do.
            for host in ("other.example", "127.0.0.1"):
                error = await refusal(fetcher.fetch(f"https://{host}:{port}/x", param=PARAM))
                assert error.code == "failed_to_download_image"
            error = await refusal(stranger.fetch(f"https://pictures.example:{port}/x", param=PARAM))
            assert error.code == "failed_to_download_image"
            error = await refusal(fetcher.fetch(f"http://pictures.example:{port}/x", param=PARAM))  # plain, to TLS
            assert error.code == "failed_to_download_image"
            assert len(server.requests) == 1

    asyncio.run(run())


# --- data URLs ---

ENCODED = base64.b64encode(BODY).decode()


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64," + ENCODED,
        "DATA:image/png;BASE64," + ENCODED,
        "data:;base64," + ENCODED,
        "data:image/*;base64," + ENCODED,
        "data:text/html;charset=x;base64," + ENCODED,
        "data:image/png; base64," + ENCODED,
        "data:image/png;base64,\n " + "\r\n".join(ENCODED[i : i + 76] for i in range(0, len(ENCODED), 76)) + "\t\f\n",
        "data:image/png;base64," + ENCODED.replace("=", "%3D").replace("+", "%2B").replace("/", "%2f"),
        "data:image/png," + "".join(f"%{byte:02x}" for byte in BODY),
        "data:," + "".join(chr(byte) if 48 <= byte < 58 else f"%{byte:02X}" for byte in BODY),
    ],
)
def test_data_urls(url: str) -> None:
    assert parse_data_url(url, max_bytes=len(BODY), param=PARAM) == BODY


@pytest.mark.parametrize("length", [*range(1, 9), 196_606, 196_607, 196_608, 196_609, 393_216, 500_001])
def test_data_urls_longer_than_a_slice(length: int) -> None:
    body = random.Random(length).randbytes(length)
    plain = "data:;base64," + base64.b64encode(body).decode()
    assert parse_data_url(plain, max_bytes=length, param=PARAM) == body
    spaced = re.sub(r"(.{61})", "\\1\n", plain)
    assert parse_data_url(spaced, max_bytes=length, param=PARAM) == body
    escaped = "data:," + "".join(f"%{byte:02x}" for byte in body)
    assert parse_data_url(escaped, max_bytes=length, param=PARAM) == body


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:image/png;base64", "invalid_image_url"),  # no comma
        ("data:", "invalid_image_url"),
        ("data:image/png;base64" + "x" * 50_000 + ",AAAA", "invalid_image_url"),
        ("http://pictures.example/x,y", "invalid_image_url"),
        ("", "invalid_image_url"),
        ("data:image/png,%zz", "invalid_image_url"),
        ("data:image/png,%4", "invalid_image_url"),
        ("data:image/png,é", "invalid_image_url"),
        ("data:image/png;base64,", "empty_image_file"),
        ("data:,", "empty_image_file"),
        ("data:image/png;base64, \n", "empty_image_file"),
        ("data:image/png;base64,AAA", "invalid_base64_image"),
        ("data:image/png;base64,AAAAA", "invalid_base64_image"),
        ("data:image/png;base64,A===", "invalid_base64_image"),
        ("data:image/png;base64,AAAA=", "invalid_base64_image"),
        ("data:image/png;base64,AA==AAAA", "invalid_base64_image"),
        ("data:image/png;base64,=AAA", "invalid_base64_image"),
        ("data:image/png;base64,-_-_", "invalid_base64_image"),  # the URL-safe alphabet
        ("data:image/png;base64,AA!A", "invalid_base64_image"),
        ("data:image/png;base64,AAé=", "invalid_base64_image"),
        ("data:image/png;base64,AA\u00a0A", "invalid_base64_image"),
        ("data:image/png;base64,AA\x00A", "invalid_base64_image"),
        ("data:image/png;base64," + "A" * ((256 << 10) - 2) + "==" + "AAAA", "invalid_base64_image"),
    ],
)
def test_bad_data_urls(url: str, code: str) -> None:
    with pytest.raises(ClientError) as caught:
        parse_data_url(url, max_bytes=1 << 20, param=PARAM)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, code, PARAM)


def test_data_url_size_is_checked_before_decoding() -> None:
    body = bytes(1001)
    for url in (
        "data:;base64," + base64.b64encode(body).decode(),
        "data:;base64,\n" + base64.b64encode(body).decode() + " !",  # bad as well, which would be found later
        "data:," + "%00" * 1001,
    ):
        with pytest.raises(ClientError) as caught:
            parse_data_url(url, max_bytes=1000, param=PARAM)
        assert caught.value.code == "image_file_too_large"
        assert "1000 bytes" in caught.value.message
        assert "1001 bytes" in caught.value.message or "!" in url
        assert len(caught.value.message) < 200
