from __future__ import annotations

import asyncio
import ipaddress
import random
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest

from server.errors import ClientError
from server.inputs.image_fetch import ImageFetcher
from tests.inputs.fetching import BODY, LOOPBACK, PARAM, Names, fetch_all, fetcher_for, record_dials, refusal
from tests.inputs.loopback import Handler, Seen, WebServer, answer, raw, redirect, web_server

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
        assert fetcher._resolver.asked == ["pictures.example"]  # type: ignore[attr-defined]

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
        async with web_server({"/x": answer(BODY)}, tls=server_side) as server:
            fetcher = fetcher_for(server, tls=trusting, resolver=names)
            stranger = fetcher_for(server, resolver=names)
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
