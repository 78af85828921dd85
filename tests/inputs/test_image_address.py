from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence

import pytest

from server.inputs.image_address import is_public, is_within, literal_address
from server.inputs.image_fetch import MAX_URL_LENGTH, ImageFetcher
from tests.inputs.fetching import BODY, LOOPBACK, PARAM, Names, fetch_all, record_dials, refusal
from tests.inputs.hostile_urls import HOSTILE_NAMES, HOSTILE_URLS
from tests.inputs.loopback import WebServer, answer, redirect, web_server


def test_hostile_urls_are_refused_without_a_packet() -> None:
    async def run() -> None:
        handlers = {"/": answer(BODY)}
        async with web_server(handlers, host="0.0.0.0") as canary, web_server(handlers, host="::1") as canary_v6:
            ports = [canary.port, canary_v6.port]
            # No extra networks: this is the fetcher of production, but for two ports more and the invented names.
            fetcher = ImageFetcher(1 << 20, 5.0, resolver=Names(), extra_ports=ports)
            dialled = record_dials()
            for pattern in HOSTILE_URLS + HOSTILE_NAMES:
                for port in ports:
                    error = await refusal(fetcher.fetch(pattern.replace("{port}", str(port)), param=PARAM))
                    assert error.code == "invalid_image_url", pattern
            assert dialled == []
            assert canary.connections == canary_v6.connections == 0
            # The canary is alive: with its network allowed, the first URL of the table reaches it.
            open_fetcher = ImageFetcher(1 << 20, 5.0, extra_ports=ports, extra_networks=[LOOPBACK])
            assert await open_fetcher.fetch(f"http://127.0.0.1:{canary.port}/", param=PARAM) == BODY
            assert (canary.connections, len(dialled)) == (1, 1)

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
        with socket.create_server(("127.0.0.2", server.port)) as canary:
            canary.setblocking(False)
            assert await fetcher.fetch(url + "/x", param=PARAM) == BODY
            assert names.asked == ["pictures.example"]
            assert dialled == [("127.0.0.1", server.port)]
            # Only 127.0.0.1 is allowed here, so a second question would have shown.
            assert (await refusal(fetcher.fetch(url + "/x", param=PARAM))).code == "invalid_image_url"
            assert len(dialled) == 1
            with pytest.raises(BlockingIOError):
                canary.accept()

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


# --- domains ---

ALLOWED = ("pictures.example", "Bücher.example", "127.0.0.1")


@pytest.mark.parametrize(
    "host",
    [
        "pictures.example",
        "PICTURES.EXAMPLE",
        "a.b.pictures.example",
        "bücher.example",
        "BÜCHER.example",
        "bücher。example",
        "xn--bcher-kva.example",
        "XN--BCHER-KVA.example",
        "www.bücher.example",
        "127.0.0.1",
    ],
)
def test_an_allowed_domain_and_what_is_below_it(host: str) -> None:
    async def everywhere(name: str, port: int) -> Sequence[str]:
        return ["127.0.0.1"]

    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        assert await fetcher.fetch(f"http://{host}:{server.port}/x", param=PARAM) == BODY

    fetch_all({"/x": answer(BODY)}, test, resolver=everywhere, allowed_domains=ALLOWED)


NOT_ALLOWED = (
    *("example", "com", "inside.example", "xpictures.example", "pictures.example.evil.com", "pictures-example"),
    *("pictures.examplex", "bucher.example", "xn--bcher-kva.evil.com", "8.8.8.8", "127.0.0.2", "[::1]"),
)


@pytest.mark.parametrize("host", NOT_ALLOWED)
def test_other_domains_are_refused_unresolved(host: str) -> None:
    names = Names({})

    async def test(server: WebServer, fetcher: ImageFetcher, url: str) -> None:
        server.handlers["/x"] = redirect(f"http://{host}:{server.port}/y")
        for target in (f"http://{host}:{server.port}/x", f"http://127.0.0.1:{server.port}/x"):
            error = await refusal(fetcher.fetch(target, param=PARAM))
            assert error.code == "invalid_image_url"
            assert host not in error.message
        assert names.asked == []
        assert server.connections == 1  # of the redirect

    fetch_all({}, test, resolver=names, allowed_domains=ALLOWED)


@pytest.mark.parametrize(
    "domain",
    [
        "",
        " ",
        "https://a.example",
        "a.example/",
        "a.example:443",
        "*.example",
        ".a.example",
        "a.example.",
        "a@b",
        "1.2",
    ],
)
def test_what_is_no_domain_is_refused_at_the_start(domain: str) -> None:
    with pytest.raises(ValueError, match="neither a domain nor an address"):
        ImageFetcher(1 << 20, 5.0, allowed_domains=["a.example", domain])


def test_domains_are_compared_by_whole_labels() -> None:
    domains = {"b.example", "xn--bcher-kva.example"}
    for host in ("b.example", "a.b.example", "a.a.b.example", "a.xn--bcher-kva.example"):
        assert is_within(host, domains)
    for host in ("example", "", "ab.example", "b.example.a", "b.exampl", "b", "."):
        assert not is_within(host, domains)


def test_an_address_has_one_spelling() -> None:
    assert literal_address("10.0.0.1") == ipaddress.ip_address("10.0.0.1")
    assert literal_address("::ffff:7f00:1") == ipaddress.ip_address("::ffff:127.0.0.1")
    assert literal_address("1.example") is None
    for host in ("1", "0x1", "1.2.3", "01.2.3.4", "fe80::1%lo", "example.1", "a..b", "a.", "-a", "a-", "", "ä"):
        with pytest.raises(ValueError):  # noqa: PT011 - its words are for nobody
            literal_address(host)
