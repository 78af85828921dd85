"""The curl and the Python that the page shows run as they are, and say what the page said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.serving import Server
from tests.web.conftest import KEY
from tests.web.pictures import card, noise
from tests.web.playground import Playground

pytestmark = pytest.mark.web

TRICKY = "Cost: $5 `ls` $(id) \\n \\\\ \\$HOME \"quoted\" 'single' ä € 😀 EOF\nEOF\n\ttab \u2028 {x} %s"


def show_snippets(page: Playground, folder: Path) -> tuple[str, str]:
    """Both, with the files that they read saved into a folder."""
    page.button("Request").last.click()
    links = page.page.get_by_role("dialog").get_by_role("link")
    for index in range(links.count()):
        with page.page.expect_download() as download:
            links.nth(index).click()
        download.value.save_as(folder / download.value.suggested_filename)
    snippets = page.snippet("curl"), page.snippet("Python")
    page.button("Close").click()
    return snippets


def run(folder: Path, *command: str, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def both_say(said: str, curl: str, python: str, folder: Path, **environment: str) -> None:
    for shell in ("sh", "bash"):
        answer = json.loads(run(folder, shell, "-c", curl, **environment))
        assert answer["choices"][0]["message"]["content"] == said
    interpreter = os.environ.get("SERVER_PYTHON", sys.executable)
    (folder / "ask.py").write_text(python, encoding="utf-8")
    assert run(folder, interpreter, "ask.py", PYTHONIOENCODING="utf-8", **environment) == said + "\n"


def test_text_with_what_shells_take_for_their_own(page: Playground, tmp_path: Path) -> None:
    page.set(Max_tokens=12, Top_k=3, System_message="Say $HOME `date`")
    said = page.said(page.ask(TRICKY))
    curl, python = show_snippets(page, tmp_path)
    assert "extra_body" in python
    both_say(said, curl, python, tmp_path)


def test_pictures_are_read_from_files(page: Playground, tmp_path: Path) -> None:
    """One of them longer than an argument may be, and two of one name; their names as awkward as names are."""
    first, second, saved = tmp_path / "first", tmp_path / "second", tmp_path / "saved"
    for folder in (first, second, saved):
        folder.mkdir()
    (first / 'it\'s a "picture" $1 (2).png').write_bytes(card("12"))
    (second / "noise.png").write_bytes(noise(300, 200))
    (first / "noise.png").write_bytes(noise(40, 30, seed=3))
    page.set(Max_tokens=10)
    page.pick(*sorted(first.iterdir()), second / "noise.png")
    page.attachments.first.get_by_label("Detail").select_option("low")
    page.ask(TRICKY)
    said = page.said(page.ask("And the last one?"))
    curl, python = show_snippets(page, saved)
    assert len(list(saved.iterdir())) == 3
    assert "$(base64 < noise.png | tr -d '\\n')" in curl
    assert "base64," in curl
    assert max(len(curl), len(python)) < 3000
    both_say(said, curl, python, saved)


def test_a_picture_by_its_address_stays_one(page: Playground, tmp_path: Path) -> None:
    page.expected_errors = ("Failed to load resource",)
    page.button("URL").click()
    page.page.get_by_label("URL").fill("http://127.0.0.1:1/a.png?x=$y")
    page.button("Add").click()
    page.ask("What?")
    curl, python = show_snippets(page, tmp_path)
    assert '"url": "http://127.0.0.1:1/a.png?x=$y"' in curl
    assert '"url": "http://127.0.0.1:1/a.png?x=$y"' in python


def test_the_key_comes_from_the_environment(open_page: Any, keyed_server: Server, tmp_path: Path) -> None:
    page = open_page(keyed_server.base_url)
    page.expected_errors = ("Failed to load resource",)
    page.page.get_by_label("Key", exact=True).last.fill(KEY)
    page.button("Use").click()
    page.set(Max_tokens=8)
    said = page.said(page.ask("Hello"))
    curl, python = show_snippets(page, tmp_path)
    both_say(said, curl, python, tmp_path, API_KEY=KEY)


def test_copied_is_what_is_shown(page: Playground) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.set(Max_tokens=3)
    answer = page.ask("Hello")
    answer.get_by_role("button", name="Copy").click()
    assert page.page.evaluate("navigator.clipboard.readText()") == page.said(answer)
    page.button("Request").click()
    shown = page.snippet("Python")
    dialog = page.page.get_by_role("dialog")
    dialog.get_by_role("button", name="Copy").click()
    assert page.page.evaluate("navigator.clipboard.readText()") == shown
