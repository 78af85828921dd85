"""What load balancers and operators ask: by which methods, and what they are told."""

from __future__ import annotations

from importlib import metadata

import httpx
import pytest

from server.api import app as app_module
from server.errors import EngineDeadError, UnavailableError
from tests.api.scripted_llm import ScriptedLLM, serving


@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_ping(url: str, llm: ScriptedLLM, method: str) -> None:
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
def test_headers_alone(url: str, llm: ScriptedLLM, path: str) -> None:
    answer = httpx.head(url + path)
    assert (answer.status_code, answer.content) == (200, b"")
    llm.is_alive = False
    answer = httpx.head(url + path)
    assert (answer.status_code, answer.content) == (503, b"")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_startup_is_over_once_it_has_been_ready(url: str, llm: ScriptedLLM, method: str) -> None:
    llm.has_started = llm.is_ready = False
    answer = httpx.request(method, f"{url}/health/startup")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert httpx.head(f"{url}/health/live").status_code == 200, "it loads"
    llm.has_started = True
    llm.is_alive = False
    assert httpx.request(method, f"{url}/health/startup").status_code == 200


def test_a_server_that_restarts_its_engine_is_alive_and_says_so(url: str, llm: ScriptedLLM) -> None:
    llm.is_ready = False
    llm.capacity_error = EngineDeadError("restarting", code="engine_restarting", retry_after=7.0)
    answer = httpx.get(f"{url}/health/ready")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")
    assert answer.json()["error"]["code"] == "engine_restarting"
    assert httpx.head(f"{url}/health/live").status_code == 200


def test_a_server_that_drains_is_alive(url: str, llm: ScriptedLLM) -> None:
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
    with serving(ScriptedLLM()) as url:
        assert httpx.get(f"{url}/version").json() == {"version": "7.8.9"}


def test_a_version_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(app_module.metadata, "version", not_installed)
    with serving(ScriptedLLM()) as url:
        assert httpx.get(f"{url}/version").json() == {"version": "0"}


def test_load(url: str, llm: ScriptedLLM) -> None:
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
