"""Asking: pictures however they come, answers as they grow, and what is measured of them."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

from tests.serving import Server
from tests.web.pictures import card
from tests.web.playground import PATIENCE_MS, Playground

pytestmark = pytest.mark.web


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "number.png"
    file.write_bytes(card("4711"))
    return file


def answered(server: Server, *parts: Any, **fields: Any) -> dict[str, Any]:
    """What the API says to the same question."""
    body = {"messages": [{"role": "user", "content": list(parts)}], "temperature": 0, "max_tokens": 256, **fields}
    answer = httpx.post(f"{server.base_url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    result: dict[str, Any] = answer.json()
    return result


def image_part(file: Path, **detail: str) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
    return {"type": "image_url", "image_url": {"url": url, **detail}}


def test_a_dropped_picture_is_answered_about(page: Playground, server: Server, picture: Path, shoot: Any) -> None:
    page.set(Max_tokens=40)
    shoot(page, "welcome")
    page.drop(picture)
    expect(page.attachments).to_have_count(1)
    expect(page.attachments.get_by_role("img")).to_have_attribute("alt", "number.png")
    shoot(page, "attached")
    answer = page.ask("What is the number?")
    shoot(page, "answered")
    expect(page.questions.get_by_role("img")).to_be_visible()
    expect(page.attachments).to_have_count(0)
    same = answered(server, image_part(picture), {"type": "text", "text": "What is the number?"}, max_tokens=40)
    assert page.said(answer) == same["choices"][0]["message"]["content"]
    usage = same["usage"]
    figures = page.figures(answer)
    image_tokens = usage["prompt_tokens_details"]["image_tokens"]
    assert figures.startswith(f"{usage['prompt_tokens']} tokens in ({image_tokens} of pictures")
    assert f"{usage['completion_tokens']} out" in figures
    assert re.search(r"first token \d+\.\d\d s · [\d,.]+ tokens/s", figures)
    assert page.page.get_by_role("status").text_content() != "Answering"


def test_an_answer_grows_while_it_is_computed(page: Playground, shoot: Any) -> None:
    page.set(Max_tokens=600)
    answer = page.ask("Tell me everything", wait=False)
    expect(page.button("Stop")).to_be_visible()
    expect(answer).to_have_attribute("aria-busy", "true")
    text = answer.locator(".text")
    expect(text).to_have_text(re.compile(r"\S"))
    first = page.said(answer)
    shoot(page, "streaming")
    page.wait()
    assert page.said(answer).startswith(first)
    assert len(page.said(answer)) > len(first) > 0
    assert "600 out" in page.figures(answer)
    assert "reached max tokens" in page.figures(answer)
    expect(answer).to_have_attribute("aria-busy", "false")


def test_a_pasted_picture(page: Playground, picture: Path) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.page.evaluate(
        """async (data) => {
          const blob = new Blob([Uint8Array.from(data)], { type: "image/png" });
          await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
        }""",
        list(picture.read_bytes()),
    )
    page.text.press("Control+v")
    expect(page.attachments).to_have_count(1)
    page.set(Max_tokens=4)
    assert "of pictures" in page.figures(page.ask("What is the number?"))
    page.page.evaluate("navigator.clipboard.writeText('only words')")
    page.text.press("Control+v")
    expect(page.text).to_have_value("only words")


def test_several_picked_pictures_each_with_its_detail(page: Playground, server: Server, tmp_path: Path) -> None:
    files = [tmp_path / f"{name}.png" for name in ("one", "two", "three")]
    for index, file in enumerate(files):
        file.write_bytes(card(str(index), colour=("#fee", "#efe", "#eef")[index]))
    page.set(Max_tokens=8)
    page.pick(*files[:2])
    page.pick(files[2])
    for index, detail in enumerate(("low", "high", "auto")):
        page.attachments.nth(index).get_by_label("Detail").select_option(detail)
    page.attachments.nth(2).get_by_role("button", name="Remove three.png").click()
    expect(page.attachments).to_have_count(2)
    answer = page.ask("Compare")
    same = answered(
        server,
        image_part(files[0], detail="low"),
        image_part(files[1], detail="high"),
        {"type": "text", "text": "Compare"},
        max_tokens=8,
    )
    assert page.said(answer) == same["choices"][0]["message"]["content"]
    assert f"({64 + 320} of pictures" in page.figures(answer)
    expect(page.questions.get_by_text("high detail")).to_be_visible()


def test_a_sample_with_its_question(page: Playground, shoot: Any) -> None:
    page.set(Max_tokens=8)
    samples = page.page.locator("#samples button")
    assert samples.count() >= 4
    samples.first.click()
    expect(page.attachments).to_have_count(1)
    suggestions = page.page.get_by_role("group", name="Suggested questions").get_by_role("button")
    expect(suggestions.first).to_be_visible()
    shoot(page, "sample")
    question = suggestions.first.inner_text()
    suggestions.first.click()
    expect(page.questions.first).to_contain_text(question)
    page.wait()
    assert "of pictures" in page.figures(page.answers.last)


def test_suggested_questions_stay_until_they_are_asked(page: Playground, picture: Path) -> None:
    page.set(Max_tokens=3)
    suggestions = page.page.get_by_role("group", name="Suggested questions").get_by_role("button")
    page.page.locator("#samples button").first.click()
    expect(page.attachments).to_have_count(1)
    others = suggestions.all_inner_texts()
    while others:
        suggestions.first.click()
        del others[0]
        expect(suggestions).to_have_text(others)
        expect(page.text).to_be_focused()
        page.wait()
    expect(page.questions.locator("img")).to_have_count(1)

    # They are about that picture: with another one, or in a new conversation, they are gone.
    for leave in (lambda: page.pick(picture), page.button("New conversation").click):
        page.button("New conversation").click()
        page.page.locator("#samples button").first.click()
        suggestions.first.click()
        page.wait()
        expect(suggestions).not_to_have_count(0)
        leave()
        expect(suggestions).to_have_count(0)


def test_suggested_questions_wait_for_the_answer(page: Playground) -> None:
    page.page.route("**/v1/chat/completions", lambda route: None)
    page.page.locator("#samples button").first.click()
    suggestions = page.page.get_by_role("group", name="Suggested questions").get_by_role("button")
    suggestions.first.click()
    expect(page.button("Stop")).to_be_visible()
    for index in range(suggestions.count()):
        expect(suggestions.nth(index)).to_be_disabled()
    page.button("Stop").click()
    page.wait()
    expect(suggestions.first).to_be_enabled()


def test_a_conversation_of_several_turns(page: Playground, picture: Path) -> None:
    page.set(Max_tokens=6, System_message="Be brief.")
    page.pick(picture)
    first = page.said(page.ask("What is the number?"))
    assert first
    with page.page.expect_request("**/v1/chat/completions") as request:
        page.ask("And backwards?")
    assert request.value.post_data_json["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image_part(picture), {"type": "text", "text": "What is the number?"}]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And backwards?"},
    ]
    assert "cached)" in page.figures(page.answers.last)


def test_settings_are_what_is_asked_with(page: Playground, server: Server) -> None:
    page.page.get_by_label("Model").select_option("org/tiny")
    settings = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "max_tokens": 20, "seed": 7, "repetition_penalty": 1.3}
    penalties = {"frequency_penalty": 0.2, "presence_penalty": 0.1}
    fields = {**settings, **penalties}
    page.set(**{name.capitalize(): value for name, value in fields.items()})
    with page.page.expect_request("**/v1/chat/completions") as request:
        answer = page.ask("Tell me")
    sent = request.value.post_data_json
    assert {name: sent[name] for name in fields} == fields
    assert sent["model"] == "org/tiny"
    expect(answer).to_contain_text("org/tiny")
    same = answered(server, {"type": "text", "text": "Tell me"}, **fields)
    assert page.said(answer) == same["choices"][0]["message"]["content"]


def test_a_setting_out_of_bounds_is_not_sent(page: Playground) -> None:
    page.set(Temperature=3)
    page.text.fill("Hello")
    page.text.press("Enter")
    expect(page.page.get_by_label("Temperature")).to_be_focused()
    expect(page.answers).to_have_count(0)
    page.button("Reset").click()
    expect(page.page.get_by_label("Temperature")).to_have_value("0")


def test_stopped_midway(page: Playground, server: Server, shoot: Any) -> None:
    page.set(Max_tokens=1900)
    answer = page.ask("Go on and on", wait=False)
    expect(answer.locator(".text")).to_have_text(re.compile(r"\S"))
    page.button("Stop").click()
    page.wait()
    expect(answer).to_contain_text("stopped")
    said = page.said(answer)
    assert said
    assert int(re.search(r"([\d,]+) out", page.figures(answer))[1].replace(",", "")) < 1900  # type: ignore[index]
    server.wait_until_idle(10)
    assert page.said(answer) == said
    shoot(page, "stopped")
    page.set(Max_tokens=4)
    page.ask("And then?")
    expect(page.answers).to_have_count(2)


def test_asked_again_changed_and_begun_anew(page: Playground, picture: Path) -> None:
    page.set(Max_tokens=5, Temperature=0)
    page.pick(picture)
    first = page.said(page.ask("First?"))
    page.ask("Second?")
    page.button("Try again").click()
    page.wait()
    expect(page.answers).to_have_count(2)
    page.questions.first.get_by_role("button", name="Edit").click()
    expect(page.text).to_have_value("First?")
    expect(page.attachments).to_have_count(1)
    page.button("Cancel").click()
    expect(page.text).to_have_value("")
    expect(page.answers).to_have_count(2)
    page.questions.first.get_by_role("button", name="Edit").click()
    answer = page.ask_edited("First!")
    expect(page.answers).to_have_count(1)
    expect(page.questions.get_by_role("img")).to_have_count(1)
    assert page.said(answer) != ""
    page.questions.first.get_by_role("button", name="Edit").click()
    assert page.said(page.ask_edited("First?")) == first
    page.button("New conversation").click()
    expect(page.answers).to_have_count(0)
    expect(page.page.get_by_role("heading", name="Ask about a picture")).to_be_visible()
    page.page.reload()
    expect(page.answers).to_have_count(0)


def test_what_a_model_writes_is_text(page: Playground) -> None:
    evil = '<img src=x onerror="alert(1)"><script>alert(2)</script>&amp; **bold**'
    chunk = '{"choices":[{"index":0,"delta":{"content":%s},"finish_reason":null}]}'
    stream = f"data: {chunk % json.dumps(evil)}\n\ndata: [DONE]\n\n"
    page.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream")
    )
    answer = page.ask(evil)
    assert page.said(answer) == evil
    assert page.questions.last.locator(".text").text_content() == evil
    assert answer.locator("img, script").count() == 0


def test_the_end_stays_in_view_unless_its_reader_has_gone_elsewhere(page: Playground) -> None:
    page.page.set_viewport_size({"width": 900, "height": 500})
    page.set(Max_tokens=500)
    page.ask("Fill the page")
    transcript = page.page.get_by_role("main")
    assert transcript.evaluate("(main) => main.scrollHeight - main.scrollTop - main.clientHeight") < 2
    assert transcript.evaluate("(main) => main.scrollTop") > 0
    page.set(Max_tokens=1900)
    answer = page.ask("Once more", wait=False)
    expect(answer.locator(".text")).to_have_text(re.compile(r"\S"))
    transcript.evaluate("(main) => main.scrollTop = 0")
    page.page.wait_for_timeout(200)
    longer = re.compile(rf"^[\s\S]{{{len(page.said(answer)) + 1}}}")
    expect(answer.locator(".text")).to_have_text(longer)
    assert transcript.evaluate("(main) => main.scrollTop") == 0
    page.text.press("Escape")
    page.wait()


def test_only_this_server_is_asked(page: Playground, server: Server, picture: Path) -> None:
    page.set(Max_tokens=4)
    page.pick(picture)
    page.ask("What?")
    assert page.requested
    for address in page.requested:
        assert address.startswith((server.base_url, "data:image/png", "blob:")), address[:200]


def test_a_machine_that_is_slow_shows_that_it_waits(page: Playground) -> None:
    page.page.route("**/v1/chat/completions", lambda route: None)
    answer = page.ask("Anybody?", wait=False)
    expect(answer).to_contain_text("waiting for the first token")
    page.text.press("Escape")
    expect(answer).to_contain_text("stopped", timeout=PATIENCE_MS)
