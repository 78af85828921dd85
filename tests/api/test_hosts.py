"""The names that a server answers to, where it was given any."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from server.api.hosts import HostNames
from server.errors import ConfigError
from tests.api.scripted_llm import ScriptedLLM, serving
from tests.connections.serving import connect

NAMES = ["api.example.com", "*.example.org", "192.0.2.7", "::1", "LOCALHOST"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(ScriptedLLM(), allowed_hosts=NAMES) as address:
        yield address


def ask(url: str, *lines: str, target: str = "/v1/models", version: str = "1.1") -> bytes:
    host, port = url.removeprefix("http://").split(":")
    with connect((host, int(port))) as client:
        request = "\r\n".join([f"GET {target} HTTP/{version}", *lines, "Connection: close", "", ""])
        client.sendall(request.encode("latin-1"))
        received = b""
        while piece := client.recv(65536):
            received += piece
    return received


def is_refused(answer: bytes) -> bool:
    assert answer[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 200")
    refused = answer.startswith(b"HTTP/1.1 400")
    assert (b'"code":"invalid_host"' in answer) is refused
    return refused


@pytest.mark.parametrize(
    "host",
    [
        "api.example.com",
        "API.Example.COM:8000",
        "api.example.com:",
        "a.example.org",
        "a.b.example.org:1",
        "192.0.2.7:80",
        "[::1]:8000",
        "localhost",
    ],
)
def test_names_of_ours(url: str, host: str) -> None:
    assert not is_refused(ask(url, f"Host: {host}"))


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "example.org",
        "xexample.org",
        "api.example.com.evil.example",
        "api.example.com.",
        "api.example.com:80:80",
        "api.example.com/?x=",
        "a/?x=api.example.com",
        "user@api.example.com",
        "evil.example, api.example.com",
        "api.example.com api.example.com",
        "::1",
        "192.0.2.70",
        "",
        "*.example.org",
        "api.example.com\xa0",
        "аpi.example.com".encode().decode("latin-1"),
    ],
)
def test_other_names(url: str, host: str) -> None:
    answer = ask(url, f"Host: {host}")
    assert is_refused(answer)
    assert b"evil" not in answer


@pytest.mark.parametrize("lines", [(), ("Host: api.example.com", "Host: api.example.com"), ("Host: x", "Host: y")])
def test_there_is_exactly_one(url: str, lines: tuple[str, ...]) -> None:
    assert is_refused(ask(url, *lines))
    with serving(ScriptedLLM()) as open_to_all:
        assert is_refused(ask(open_to_all, *lines))
        assert not is_refused(ask(open_to_all, "Host: any/?x="))


def test_before_http_1_1_there_was_none(url: str) -> None:
    assert is_refused(ask(url, version="1.0"))
    with serving(ScriptedLLM()) as open_to_all:
        assert not is_refused(ask(open_to_all, version="1.0"))


def test_a_whole_url_as_target_changes_neither_name_nor_path(url: str) -> None:
    assert is_refused(ask(url, "Host: evil.example", target="http://api.example.com/v1/models"))
    assert not is_refused(ask(url, "Host: api.example.com", target="http://evil.example/v1/models"))
    answer = ask(url, "Host: api.example.com", target="http://evil.example/nothing?/v1/models")
    assert answer.startswith(b"HTTP/1.1 404 ")


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready"])
def test_health_is_told_under_any_name(url: str, path: str) -> None:
    """Whoever watches over containers asks them by an address that nobody knows beforehand."""
    assert httpx.get(url + path).status_code == 200
    assert httpx.get(f"{url}/metrics").status_code == 400
    assert is_refused(ask(url, "Host: x", target=path.replace("h", "%68")))


def test_a_refused_body_is_read_before_the_connection_ends(url: str) -> None:
    answer = httpx.post(f"{url}/v1/chat/completions", content=b"a" * (4 << 20))
    assert (answer.status_code, answer.headers["connection"]) == (400, "close")
    assert answer.json()["error"]["param"] == "Host"


@pytest.mark.parametrize("name", ["", "*", "a b", "http://a", "a:80", "*.*.a", "a/b", "ä.example", "[::1"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ConfigError, match="allowed_hosts: "):
        HostNames([name])
