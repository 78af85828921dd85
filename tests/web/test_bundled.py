"""What a newcomer sees after `make serve`: the bundled model, a sample picture, and the right answer.

`cp build/screenshots/readme.png tests/web/playground.png` takes over the picture that README opens with.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.serving import ROOT, Server, running_server
from tests.web.playground import Playground

pytestmark = pytest.mark.web

SAMPLES = ROOT / "server" / "web" / "samples"
RECEIPT, PAGE = SAMPLES / "receipt.png", SAMPLES / "page.png"


def answers(file: Path) -> dict[str, str]:
    """The questions about a sample, the first one first, and what is right."""
    listed: list[dict[str, Any]] = json.loads((SAMPLES / "index.json").read_text(encoding="utf-8"))
    (sample,) = (sample for sample in listed if sample["file"] == file.name)
    return dict(zip(sample["questions"], sample["answers"], strict=True))


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("bundled")
    config = ("--config", str(ROOT / "configs" / "demo.yaml"))
    with running_server(None, folder / "log", *config, XDG_CACHE_HOME=str(folder)) as running:
        yield running
        running.wait_until_idle()
        assert running.stop() == 0
    assert "Traceback" not in (folder / "log").read_text()


@pytest.fixture
def page(open_page: Callable[..., Playground], bundled: Server) -> Playground:
    return open_page(bundled.base_url)


def test_what_readme_opens_with(open_page: Callable[..., Playground], bundled: Server, shoot: Any) -> None:
    page = open_page(bundled.base_url, viewport={"width": 900, "height": 890})
    page.page.locator("#samples button").first.click()
    expect(page.attachments).to_have_count(1)
    for question, right in list(answers(RECEIPT).items())[:2]:
        assert page.said(page.ask(question)) == right
    page.page.mouse.move(0, 0)
    shoot(page, "readme")


def test_the_command_in_readme_says_what_readme_says(bundled: Server) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Ask\n")[2].partition("\n## ")[0]
    command, right = re.findall(r"```bash\n(.*?)```\n\nsays `(.*?)`", section, re.DOTALL)[0]
    command = command.replace("http://127.0.0.1:8000", bundled.base_url)
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, timeout=60, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == right


def test_a_dropped_picture_is_answered_right(page: Playground, shoot: Any) -> None:
    page.drop(RECEIPT)
    expect(page.attachments).to_have_count(1)
    for question, right in answers(RECEIPT).items():
        answer = page.ask(question)
        assert page.said(answer) == right
        assert re.search(r"tokens in \(.*320 of pictures.*\) · \d+ out", page.figures(answer).replace("\n", " "))
    shoot(page, "bundled")
    page.page.reload()
    expect(page.answers).to_have_count(len(answers(RECEIPT)))
    assert page.said(page.answers.last) == right
    # The conversation goes on about the same picture.
    (question, right), *_ = answers(RECEIPT).items()
    assert page.said(page.ask(question)) == right


def test_every_sample_is_answered_right_at_a_click(page: Playground) -> None:
    listed = json.loads((SAMPLES / "index.json").read_text(encoding="utf-8"))
    suggestions = page.page.get_by_role("group", name="Suggested questions").get_by_role("button")
    for index, sample in enumerate(listed):
        page.page.locator("#samples button").nth(index).click()
        expect(page.attachments).to_have_count(1)
        for asked, answer in enumerate(sample["answers"], start=1):
            suggestions.first.click()
            expect(page.answers).to_have_count(asked)
            page.wait()
            assert page.said(page.answers.last) == answer
        page.button("New conversation").click()
        expect(page.answers).to_have_count(0)


def test_the_samples(page: Playground, shoot: Any) -> None:
    pictures = page.page.locator("#samples img")
    expect(pictures).to_have_count(len(json.loads((SAMPLES / "index.json").read_text(encoding="utf-8"))))
    page.page.wait_for_function("[...document.querySelectorAll('#samples img')].every((i) => i.complete)")
    shoot(page, "samples")


def test_small_print_is_read_in_detail_alone(page: Playground) -> None:
    (question, right), *_ = answers(PAGE).items()
    for detail, is_right in (("low", False), ("high", True)):
        page.pick(PAGE)
        page.attachments.first.get_by_label("Detail").select_option(detail)
        assert (page.said(page.ask(question)) == right) is is_right
        page.button("New conversation").click()


def test_an_answer_is_stopped_midway(page: Playground) -> None:
    page.set(Max_tokens=1000, Repetition_penalty=1.2)  # so that it does not come to an end by itself
    page.pick(PAGE)
    answer = page.ask("Read all the text.", wait=False)
    expect(answer.locator(".text")).to_have_text(re.compile(r"\S"))
    page.button("Stop").click()
    page.wait()
    expect(answer).to_contain_text("stopped")
    assert page.said(answer)
