"""What goes wrong is told in the server's words; and the key, which is asked for, kept in the tab and shown nowhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.serving import Server
from tests.web.conftest import KEY, POOR
from tests.web.playground import Playground

pytestmark = pytest.mark.web

REFUSED = "Failed to load resource"  # what a browser's console says of a status from 400 on


def give_key(page: Playground, key: str) -> None:
    expect(page.page.get_by_role("dialog")).to_be_visible()
    page.page.get_by_label("Key", exact=True).last.fill(key)
    page.button("Use").click()


def test_the_servers_own_words(page: Playground, shoot: Any) -> None:
    page.expected_errors = (REFUSED,)
    page.button("URL").click()
    page.page.get_by_label("URL").fill("http://127.0.0.1:1/secret.png")
    page.button("Add").click()
    expect(page.attachments).to_contain_text("http://127.0.0.1:1/secret.png")
    with page.page.expect_response("**/v1/chat/completions") as response:
        answer = page.ask("What is it?", wait=False)
    page.wait()
    message = response.value.json()["error"]["message"]
    assert response.value.status == 400
    expect(answer.get_by_role("alert")).to_contain_text(message)
    expect(page.questions).to_contain_text("http://127.0.0.1:1/secret.png")
    shoot(page, "error")
    assert not [address for address in page.requested if "secret" in address]
    # What was asked is still there, to be changed.
    page.button("Edit").click()
    page.button("Remove secret.png").click()
    page.set(Max_tokens=3)
    answer = page.ask_edited("Hello")
    expect(answer).to_have_attribute("data-state", "complete")


def test_what_is_no_address_and_no_picture(page: Playground, tmp_path: Path) -> None:
    for wrong in ("", "picture.png", "ftp://a/b.png", "javascript:alert(1)", "data:image/png;base64,@"):
        page.button("URL").click()
        page.page.get_by_label("URL").fill(wrong)
        page.page.keyboard.press("Enter")
        expect(page.page.get_by_role("dialog").get_by_role("alert")).to_be_visible()
        page.page.keyboard.press("Escape")
        expect(page.page.get_by_role("dialog")).to_have_count(0)
    (tmp_path / "notes.txt").write_text("words")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.drop(tmp_path / "notes.txt")
    expect(page.page.get_by_role("alert")).to_contain_text("notes.txt is text/plain")
    page.drop(tmp_path / "broken.png")
    expect(page.page.get_by_role("alert")).to_contain_text("broken.png is not a picture")
    expect(page.attachments).to_have_count(0)


def test_an_error_within_a_stream_keeps_what_came_before(page: Playground) -> None:
    events = [
        {"choices": [{"index": 0, "delta": {"content": "So far "}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {"content": "so good"}, "finish_reason": None}]},
        {"error": {"message": "the engine has been replaced", "type": "server_error", "param": None, "code": "x"}},
    ]
    stream = ": comment\r\n\r\n" + "".join(f"data: {json.dumps(event)}\r\n\r\n" for event in events)
    answer_with = {"body": stream, "content_type": "text/event-stream"}
    page.page.route("**/v1/chat/completions", lambda route: route.fulfill(**answer_with))
    answer = page.ask("How is it?")
    assert page.said(answer) == "So far so good"
    expect(answer.get_by_role("alert")).to_contain_text("the engine has been replaced")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"body": "data: {}\n\n", "content_type": "text/event-stream"}, "ended before the answer was complete"),
        ({"body": "data: {\n\n", "content_type": "text/event-stream"}, "not a JSON object"),
        ({"body": "{}", "content_type": "application/json"}, "not a stream of events"),
        ({"body": "<h1>Bad gateway</h1>", "status": 502, "content_type": "text/html"}, "answered 502"),
        (None, "cannot be reached"),
    ],
)
def test_what_no_server_should_answer(page: Playground, answer: dict[str, Any] | None, message: str) -> None:
    page.expected_errors = (REFUSED,)
    page.page.route(
        "**/v1/chat/completions", lambda route: route.abort() if answer is None else route.fulfill(**answer)
    )
    expect(page.ask("Hello").get_by_role("alert")).to_contain_text(message)


def test_a_server_that_is_not_there_when_the_page_loads(page: Playground) -> None:
    page.expected_errors = (REFUSED,)
    page.page.route("**/v1/models", lambda route: route.abort())
    page.page.reload()
    expect(page.page.get_by_role("alert")).to_contain_text("cannot be reached")


def test_the_key_is_asked_for(open_page: Callable[..., Playground], keyed_server: Server, shoot: Any) -> None:
    page = open_page(keyed_server.base_url)
    page.expected_errors = (REFUSED,)
    expect(page.page.get_by_role("dialog")).to_contain_text("no API key provided")
    shoot(page, "key")
    give_key(page, "sk-wrong")
    expect(page.page.get_by_role("dialog")).to_contain_text("incorrect API key provided")
    give_key(page, KEY)
    expect(page.page.get_by_label("Model")).to_have_value("tiny")
    page.set(Max_tokens=4)
    expect(page.ask("Hello")).to_have_attribute("data-state", "complete")
    kept = page.page.evaluate("[JSON.stringify(localStorage), document.cookie, location.href, document.body.innerHTML]")
    assert not [text for text in kept if "canary" in text]
    page.button("Request").click()
    for language in ("curl", "Python"):
        assert "API_KEY" in page.snippet(language)
        assert "canary" not in page.snippet(language)
    page.button("Close").click()
    page.page.reload()
    expect(page.ask("And again")).to_have_attribute("data-state", "complete")
    page.button("Key").click()
    page.button("Forget").click()
    answer = page.ask("Without")
    expect(page.page.get_by_role("dialog")).to_contain_text("no API key provided")
    page.page.keyboard.press("Escape")
    expect(answer.get_by_role("alert")).to_contain_text("no API key provided")
    assert [address for address in page.requested if "canary" in address] == []


def test_a_key_given_late_answers_the_question(open_page: Callable[..., Playground], keyed_server: Server) -> None:
    page = open_page(keyed_server.base_url)
    page.expected_errors = (REFUSED,)
    page.button("Cancel").click()
    page.set(Max_tokens=4)
    page.ask("Hello", wait=False)
    give_key(page, KEY)
    expect(page.answers.last).to_have_attribute("data-state", "complete")
    expect(page.answers).to_have_count(1)
    expect(page.page.get_by_label("Model")).to_have_value("tiny")


def test_who_must_wait_is_told_for_how_long(
    open_page: Callable[..., Playground], keyed_server: Server, shoot: Any
) -> None:
    page = open_page(keyed_server.base_url)
    page.expected_errors = (REFUSED,)
    give_key(page, POOR)
    page.set(Max_tokens=100)
    page.ask("Much")
    with page.page.expect_response("**/v1/chat/completions") as response:
        answer = page.ask("And more", wait=False)
    assert response.value.status == 429
    expect(answer.get_by_role("alert")).to_contain_text("the limit is 60")
    expect(answer).to_contain_text(f"The server asks to wait {response.value.headers['retry-after']} s")
    expect(answer).to_contain_text(re.compile(r"\d+ s are left"))
    shoot(page, "limited")
