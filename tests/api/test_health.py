"""What load balancers and operators ask: by which methods, and what they are told."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

import httpx
import pytest

from server.api import app as app_module
from server.errors import UnavailableError

from .prompt_llm import PromptLLM
from .scripted_llm import serving


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[PromptLLM, str]]:
    llm = PromptLLM()
    with serving(llm) as url:
        yield llm, url


@pytest.fixture
def llm(server: tuple[PromptLLM, str]) -> PromptLLM:
    server[0].reset()
    return server[0]


@pytest.fixture
def url(llm: PromptLLM, server: tuple[PromptLLM, str]) -> str:
    return server[1]


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_ping(url: str, llm: PromptLLM, method: str) -> None:
    answer = httpx.request(method, f"{url}/ping")
    assert answer.status_code == 200
    assert answer.content == (b"" if method == "HEAD" else b'{"status":"ok"}')
    llm.is_ready = False
    llm.capacity_error = UnavailableError("the model is still loading", code="model_loading", retry_after=5.0)
    answer = httpx.request(method, f"{url}/ping")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    llm.is_alive = False
    assert httpx.request(method, f"{url}/ping").status_code == 503


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/health/live"])
def test_headers_alone(url: str, llm: PromptLLM, path: str) -> None:
    answer = httpx.head(url + path)
    assert (answer.status_code, answer.content) == (200, b"")
    llm.is_alive = False
    answer = httpx.head(url + path)
    assert (answer.status_code, answer.content) == (503, b"")


def test_a_server_that_drains_is_alive(url: str, llm: PromptLLM) -> None:
    llm.is_ready = False
    assert [httpx.head(url + path).status_code for path in ("/health", "/health/ready", "/health/live")] == [
        *(503, 503, 200)
    ]


def test_version(url: str) -> None:
    told = httpx.get(f"{url}/version").json()
    assert set(told) == {"version"}
    assert told["version"] == httpx.get(f"{url}/openapi.json").json()["info"]["version"]


def test_which_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> str:
        assert name == "idefics2-server"
        return "7.8.9"

    monkeypatch.setattr(metadata, "version", installed)
    with serving(PromptLLM()) as url:
        assert httpx.get(f"{url}/version").json() == {"version": "7.8.9"}


def test_a_version_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(app_module.metadata, "version", not_installed)
    with serving(PromptLLM()) as url:
        assert httpx.get(f"{url}/version").json() == {"version": "0"}


def test_load(url: str, llm: PromptLLM) -> None:
    assert httpx.get(f"{url}/load").json() == {"server_load": 0}
    llm.num_in_flight = 7
    assert httpx.get(f"{url}/load").json() == {"server_load": 7}


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/version"), ("POST", "/load"), ("PUT", "/ping"), ("POST", "/health")]
)
def test_other_methods(url: str, method: str, path: str) -> None:
    answer = httpx.request(method, url + path)
    assert answer.status_code == 405
    assert "GET" in answer.headers["allow"]
    assert answer.json()["error"]["code"] == "method_not_allowed"
