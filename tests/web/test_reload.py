"""What a reload keeps: the settings, and the conversation with its pictures as far as there is room."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.web.pictures import card, noise
from tests.web.playground import Playground

pytestmark = pytest.mark.web


def test_a_conversation_survives(page: Playground, tmp_path: Path, shoot: Any) -> None:
    (tmp_path / "a.png").write_bytes(card("42"))
    page.set(Max_tokens=6, Seed=5)
    page.pick(tmp_path / "a.png")
    said = page.said(page.ask("What is it?"))
    figures = page.figures(page.answers.last)
    page.page.reload()
    expect(page.answers).to_have_count(1)
    assert page.said(page.answers.last) == said
    assert page.figures(page.answers.last) == figures
    expect(page.questions.get_by_role("img")).to_be_visible()
    expect(page.page.get_by_label("Seed")).to_have_value("5")
    shoot(page, "reloaded")
    assert "cached)" in page.figures(page.ask("And now?"))  # the same picture has been sent again
    kept = page.page.evaluate(
        "async () => [localStorage.length, document.cookie, (await indexedDB.databases()).length]"
    )
    assert kept == [0, "", 0]


def test_an_answer_that_a_reload_cuts_off(page: Playground) -> None:
    page.set(Max_tokens=1900)
    answer = page.ask("Go on", wait=False)
    expect(answer.locator(".text")).to_have_text(re.compile(r"\S"))
    page.page.reload()
    expect(page.answers).to_have_count(1)
    expect(page.answers.last).to_contain_text("stopped")
    assert page.said(page.answers.last)
    page.set(Max_tokens=4)
    page.button("Try again").click()
    page.wait()
    expect(page.answers.last).to_have_attribute("data-state", "complete")


def test_pictures_for_which_there_is_no_room(page: Playground, tmp_path: Path) -> None:
    """The latest are kept; what is not kept is said, before and after."""
    for name in ("old", "new"):
        (tmp_path / f"{name}.png").write_bytes(noise(1000, 800, seed=len(name) + ord(name[0])))  # 2.4 MB each
    page.set(Max_tokens=3)
    page.pick(tmp_path / "old.png")
    page.ask("One")
    page.pick(tmp_path / "new.png")
    page.ask("Two")
    expect(page.page.get_by_role("alert")).to_contain_text("more pictures than a reload")
    page.page.reload()
    expect(page.questions.first).to_contain_text("old.png was too large to keep and is no longer sent")
    expect(page.questions.last.get_by_role("img")).to_be_visible()
    expect(page.ask("Three")).to_have_attribute("data-state", "complete")


def test_storage_that_is_broken_or_forbidden(page: Playground) -> None:
    page.page.evaluate("sessionStorage.setItem('idefics2.conversation', '{')")
    page.page.reload()
    expect(page.page.get_by_role("heading", name="Ask about a picture")).to_be_visible()
    page.context.add_init_script(
        "Object.defineProperty(window, 'sessionStorage', { get() { throw new DOMException('no', 'SecurityError') } })"
    )
    page.page.reload()
    page.set(Max_tokens=3)
    expect(page.ask("Hello")).to_have_attribute("data-state", "complete")
