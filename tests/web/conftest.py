"""The playground in a real browser, against a real server process. `make test-page` runs it.

This folder is collected under `-m web` and not otherwise: its tests run in a virtual environment of their own, which
has Playwright and not the server's packages. The environment says the rest:

- SERVER_PYTHON: the interpreter that starts the server; tests/serving.py reads it.
- CHROMIUM: the browser, where it is not on PATH.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.serving import ROOT, SMALL, Server, make_checkpoint, running_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from tests.web.playground import Playground

SCREENSHOTS = ROOT / "build" / "screenshots"
MODELS = ("tiny", "org/tiny")
USUAL = {"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce"}
SERVED = (*SMALL, "--served-model-name", *MODELS, "--num-threads", "1")

# Keys of the second server, one of which may have little.
KEY, POOR = "sk-alice-canary-0123456789", "sk-poor-canary-0123456789"


def is_asked_for(config: pytest.Config) -> bool:
    return bool(config.getoption("markexpr") == "web")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_test = collection_path.name.startswith("test_")
    return True if is_test and not is_asked_for(config) else None


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be read only."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server without keys for all tests. At the end nothing may be left running, and nothing broken."""
    log = tmp_path_factory.mktemp("server") / "log"
    with running_server(checkpoint, log, *SERVED) as running:
        yield running
        running.wait_until_idle()
        assert running.stop() == 0
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="session")
def keyed_server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("keyed")
    (folder / "keys").write_text(f"alice={KEY}\npoor={POOR} tokens_per_minute=60\n")
    (folder / "keys").chmod(0o600)
    with running_server(checkpoint, folder / "log", *SERVED, "--api-key-file", str(folder / "keys")) as running:
        yield running
    assert "canary" not in (folder / "log").read_text()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.fail("there is no Chromium: apt-get install chromium, or name one with CHROMIUM=PATH")
    # The sandbox of the browser needs what containers and root do not have; it only meets pages of this repository.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Playground]]:
    """Opens the page at an address, in a browser window of its own; options are Playwright's for a context.

    At the end of a test no window may have reported an error, but for those of `expected_errors`.
    """
    from tests.web.playground import Playground

    opened: list[Playground] = []

    def make(address: str, **options: Any) -> Playground:
        opened.append(Playground(browser.new_context(**{**USUAL, **options}), address))
        return opened[-1]

    yield make
    for page in opened:
        problems = page.problems()
        page.context.close()
        assert problems == []


@pytest.fixture
def page(open_page: Callable[..., Playground], server: Server) -> Playground:
    return open_page(server.base_url)


@pytest.fixture
def shoot(request: pytest.FixtureRequest) -> Callable[[Playground, str], None]:
    """Keeps what a window shows as build/screenshots/NAME.png."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)

    def take(page: Playground, name: str) -> None:
        page.page.screenshot(path=SCREENSHOTS / f"{name}.png")

    return take
