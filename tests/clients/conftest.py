"""Real clients, unmodified, against a real server process. `make test-clients` runs them.

Knows how the server and the programs among the clients are started, and which clients were asked for. What each
client does and must see is in its own file.

This folder is collected under `-m clients` and not otherwise: its tests run in a virtual environment of their own,
which has the clients' packages and not the server's. The environment says the rest:

- CLIENTS: names separated by spaces, to run those alone. A client that is not left out and not there is a failure.
- SERVER_PYTHON: the interpreter that starts the server; tests/serving.py reads it.
- VLLM, GUIDELLM: the two programs, where they are not on PATH or beside this interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.programs import GUIDELLM, VLLM, Program, version_table
from tests.clients.talk import MODEL, closing_bias
from tests.serving import SMALL, Server, checked_server, make_checkpoint

CLIENTS = ("openai", "langchain", "litellm", "vllm", "guidellm", "schemathesis")
NAMES = ("--served-model-name", MODEL, f"org/{MODEL}", "--num-threads", "1")


def is_asked_for(config: pytest.Config) -> bool:
    return bool(config.getoption("markexpr") == "clients")


def chosen() -> list[str]:
    names = os.environ.get("CLIENTS", "").split() or list(CLIENTS)
    unknown = sorted(set(names) - set(CLIENTS))
    if unknown:
        raise pytest.UsageError(f"CLIENTS: unknown {', '.join(unknown)}; there are {', '.join(CLIENTS)}")
    return names


def pytest_configure(config: pytest.Config) -> None:
    if is_asked_for(config):
        chosen()
        # Other people's packages warn about each other, which is none of this server's business.
        config.addinivalue_line("filterwarnings", "ignore")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out all files, or those of clients that are not wanted: `test_CLIENT.py` and `test_CLIENT_*.py`."""
    if not collection_path.name.startswith("test_"):
        return None
    client = collection_path.stem.split("_")[1]
    return not is_asked_for(config) or client not in chosen() or None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if is_asked_for(config):
        terminalreporter.section("clients")
        for line in version_table(chosen()):
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be read only."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all clients. At the end nothing may be left running, cached blocks aside, and nothing broken."""
    log = tmp_path_factory.mktemp("server") / "log"
    with checked_server(checkpoint, log, *SMALL, *NAMES) as running:
        yield running


@pytest.fixture(scope="session")
def closing(server: Server) -> dict[str, int]:
    return closing_bias(server.base_url)


@pytest.fixture(scope="session")
def vllm() -> Program:
    return VLLM.found()


@pytest.fixture(scope="session")
def guidellm() -> Program:
    return GUIDELLM.found()
