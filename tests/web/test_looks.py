"""For whoever has no mouse, a dark room, a small screen or no eye for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.serving import Server
from tests.web.pictures import card
from tests.web.playground import Playground

pytestmark = pytest.mark.web

OVERFLOW = """() => [...document.querySelectorAll("html, body, #transcript, #composer, .bar, #settings, dialog[open]")]
  .filter((element) => element.scrollWidth > element.clientWidth + 1).map((element) => element.id || element.tagName)"""
FOCUSED = """() => { const e = document.activeElement;
  return e.ariaLabel || e.labels?.[0]?.textContent.trim() || e.textContent.trim() || e.id || e.tagName }"""
# WCAG 2.2, relative luminance; of every text that is shown, against the nearest background that is not transparent.
CONTRASTS = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const background = (e) => { for (; e; e = e.parentElement) {
    const colour = rgba(getComputedStyle(e).backgroundColor); if (colour[3] === 255) return colour; }
    return rgba("Canvas"); };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility({ visibilityProperty: true })) continue;
    if (element.closest("option, template, noscript, .unseen")) continue;
    const [a, b] = [luminance(rgba(getComputedStyle(element).color)), luminance(background(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${ratio.toFixed(2)} ${element.className} ${walker.currentNode.data.slice(0, 30)}`);
  }
  return low;
}"""


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "number.png"
    file.write_bytes(card("4711"))
    return file


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(
    open_page: Callable[..., Playground], server: Server, picture: Path, shoot: Any, scheme: str
) -> None:
    page = open_page(server.base_url, color_scheme=scheme)
    expect(page.page.get_by_label("Model")).to_have_value("tiny")
    expect(page.page.locator("#samples img").first).to_be_visible()
    shoot(page, f"{scheme}-welcome")
    assert page.page.evaluate(CONTRASTS) == []
    page.pick(picture)
    page.set(Max_tokens=60)
    page.ask("What is the number on this card?")
    shoot(page, f"{scheme}-answer")
    assert page.page.evaluate(CONTRASTS) == []
    page.button("Request").click()
    shoot(page, f"{scheme}-request")
    assert page.page.evaluate(CONTRASTS) == []
    paper = page.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", paper)[:3])) / 3
    assert (brightness < 64) if scheme == "dark" else (brightness > 192)


@pytest.mark.parametrize("width", [320, 360, 768])
def test_on_a_small_screen_nothing_scrolls_sideways(
    open_page: Callable[..., Playground], server: Server, picture: Path, shoot: Any, width: int
) -> None:
    page = open_page(server.base_url, viewport={"width": width, "height": 740}, has_touch=True, device_scale_factor=2)
    expect(page.page.get_by_label("Model")).to_have_value("tiny")
    expect(page.page.locator("#samples img").first).to_be_visible()
    shoot(page, f"{width}-welcome")
    assert page.page.evaluate(OVERFLOW) == []
    page.set(Max_tokens=40)
    shoot(page, f"{width}-settings")
    assert page.page.evaluate(OVERFLOW) == []
    page.button("Settings").click()
    page.pick(picture, picture)
    page.text.fill("A line that is longer than the screen is wide, and a word: " + "x" * 60)
    shoot(page, f"{width}-attached")
    assert page.page.evaluate(OVERFLOW) == []
    page.ask("https://example.com/" + "path" * 30)
    shoot(page, f"{width}-answer")
    assert page.page.evaluate(OVERFLOW) == []
    page.button("Request").click()
    shoot(page, f"{width}-request")
    assert page.page.evaluate(OVERFLOW) == []
    box = page.page.get_by_role("dialog").bounding_box()
    assert box
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width


def test_all_of_it_with_the_keyboard(page: Playground, shoot: Any) -> None:
    keys = page.page.keyboard
    expect(page.page.get_by_label("Model")).to_have_value("tiny")
    expect(page.text).to_be_focused()
    page.page.get_by_label("Max tokens").fill("30")
    page.text.focus()
    keys.type("First line")
    keys.press("Shift+Enter")
    keys.type("second line")
    keys.press("Enter")
    page.wait()
    assert page.questions.locator(".text").text_content() == "First line\nsecond line"
    expect(page.text).to_be_focused()

    # Backwards through what was said, to what belongs to the last answer.
    seen = []
    for _ in range(4):
        keys.press("Shift+Tab")
        seen.append(page.page.evaluate(FOCUSED))
    assert seen == ["Request", "Copy", "Try again", "Edit"]
    keys.press("Tab")
    keys.press("Tab")
    keys.press("Tab")
    assert page.page.evaluate(FOCUSED) == "Request"
    shoot(page, "focus")
    keys.press("Enter")
    dialog = page.page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    expect(page.page.get_by_role("tab", name="curl")).to_be_focused()
    keys.press("ArrowRight")
    expect(page.page.get_by_role("tab", name="Python")).to_be_focused()
    expect(page.page.get_by_role("tabpanel")).to_contain_text("from openai import OpenAI")
    keys.press("Escape")
    expect(dialog).to_have_count(0)
    assert page.page.evaluate(FOCUSED) == "Request"

    # Forwards through the composer.
    seen = []
    for _ in range(4):
        keys.press("Tab")
        seen.append(page.page.evaluate(FOCUSED))
    assert seen == ["Question", "Picture", "URL", "Send"]

    # A sample, then stop with Escape.
    page.button("New conversation").focus()
    keys.press("Enter")
    expect(page.text).to_be_focused()
    page.page.locator("#samples button").first.focus()
    keys.press("Enter")
    expect(page.attachments).to_have_count(1)
    expect(page.text).to_be_focused()
    keys.press("Shift+Tab")
    keys.press("Shift+Tab")
    assert page.page.evaluate(FOCUSED).startswith("Detail of ")
    page.page.get_by_label("Max tokens").fill("1900")
    page.text.focus()
    keys.type("Go on")
    keys.press("Enter")
    expect(page.answers.last.locator(".text")).to_have_text(re.compile(r"\S"))
    keys.press("Escape")
    page.wait()
    expect(page.answers.last).to_contain_text("stopped")


def test_nothing_moves_when_an_answer_ends(open_page: Callable[..., Playground], server: Server) -> None:
    """Nothing but the cursor and what stands below is moved by an answer, and nothing by its end."""
    page = open_page(server.base_url, viewport={"width": 1000, "height": 3000})
    page.set(Max_tokens=300)
    page.page.evaluate("""() => {
      globalThis.shifts = [];
      new PerformanceObserver((list) => {
        for (const source of list.getEntries().flatMap((entry) => entry.sources)) {
          const element = source.node?.nodeType === Node.TEXT_NODE ? source.node.parentElement : source.node;
          if (element?.nodeName === "::after") continue;
          shifts.push(element?.closest(".foot") ? "foot" : (element?.outerHTML.slice(0, 80) ?? "gone"));
        }
      }).observe({ type: "layout-shift" });
    }""")
    answer = page.ask("Tell me", wait=False)
    expect(answer.locator(".text")).to_have_text(re.compile(r"\S"))
    page.page.evaluate("""() => {
      const foot = document.querySelector(".answer .foot");
      globalThis.heights = new Set();
      new ResizeObserver(() => heights.add(foot.offsetHeight)).observe(foot);
    }""")
    page.wait()
    page.page.wait_for_timeout(200)
    assert set(page.page.evaluate("shifts")) <= {"foot"}
    assert len(page.page.evaluate("[...heights]")) == 1


def test_without_motion_nothing_moves_by_itself(open_page: Callable[..., Playground], server: Server) -> None:
    for preference, count in (("reduce", 0), ("no-preference", 1)):
        page = open_page(server.base_url, reduced_motion=preference)
        page.page.route("**/v1/chat/completions", lambda route: None)
        page.ask("Anybody?", wait=False)
        assert page.page.evaluate("document.getAnimations().length") == count
        page.text.press("Escape")


def test_every_control_has_a_name(page: Playground) -> None:
    page.set(Max_tokens=3)
    page.ask("Hello")
    controls = page.page.locator("button:visible, input:visible, select:visible, textarea:visible")
    for index in range(controls.count()):
        expect(controls.nth(index)).to_have_accessible_name(re.compile(r"\S"))
