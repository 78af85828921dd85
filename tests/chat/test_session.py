from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.responses import JSONResponse

from server.chat.conversation import Turn
from server.chat.endpoint import Endpoint
from server.chat.errors import ChatError
from server.chat.images import Picture
from server.chat.session import Session
from server.chat.settings import Settings
from tests.bench.canned import DONE, CannedServer, text
from tests.bench.canned import Answer as Script

PICTURE = Picture("a.png", "data:image/png;base64,aaaa")


def ignore(_: str) -> None:
    pass


def interrupt(_: str) -> None:
    raise KeyboardInterrupt


class Chat:
    """A session with a server that gives one script after another."""

    def __init__(self, *scripts: Script) -> None:
        self.server = CannedServer(script=lambda number: scripts[number])

    def __enter__(self) -> Chat:
        self._running = self.server.running()
        self._running.__enter__()
        endpoint = Endpoint(self.server.url)
        self.session = Session(endpoint, model="m", settings=Settings(max_tokens=5), system="s")
        return self

    def __exit__(self, *_: object) -> None:
        self.session.endpoint.__exit__()
        self._running.__exit__(None, None, None)

    @property
    def asked(self) -> list[list[object]]:
        """The contents of each request's messages."""
        return [[message["content"] for message in body["messages"]] for body in self.server.bodies]


def said(word: str) -> Script:
    return [text(word, "stop") + DONE]


FAILED: Script = JSONResponse({"error": {"message": "no"}}, 500)


@pytest.fixture
def whole() -> Iterator[Chat]:
    with Chat(said("one"), said("two"), said("three")) as chat:
        yield chat


def test_each_question_goes_with_all_before_it(whole: Chat) -> None:
    told: list[str] = []
    whole.session.pictures = [PICTURE]
    assert whole.session.ask("a", told.append).text == "one"
    whole.session.ask("b", told.append)
    assert told == ["one", "two"]
    question = [PICTURE.part(), {"type": "text", "text": "a"}]
    assert whole.asked == [["s", question], ["s", question, "one", "b"]]
    assert whole.server.bodies[0]["model"] == "m"
    assert whole.server.bodies[0]["max_tokens"] == 5
    assert whole.session.pictures == []
    assert [turn.answer for turn in whole.session.conversation.turns] == ["one", "two"]


def test_a_question_that_failed_is_not_kept_but_its_pictures_are() -> None:
    with Chat(said("one"), FAILED, said("two"), said("three")) as chat:
        chat.session.ask("a", ignore)
        chat.session.pictures = [PICTURE]
        with pytest.raises(ChatError, match="HTTP 500: no"):
            chat.session.ask("b", ignore)
        assert len(chat.session.conversation.turns) == 1
        assert chat.session.pictures == [PICTURE]
        chat.session.ask("c", ignore)
        assert chat.asked[-1] == ["s", "a", "one", [PICTURE.part(), {"type": "text", "text": "c"}]]
        assert chat.session.pictures == []


def test_an_answer_cut_off_is_not_kept() -> None:
    with Chat([text("half")]) as chat:
        with pytest.raises(ChatError, match="cut off"):
            chat.session.ask("a", ignore)
        assert chat.session.conversation.turns == []


def test_a_stopped_answer_is_kept_as_far_as_it_came() -> None:
    with Chat([text("half"), 60.0], said("on")) as chat:
        chat.session.pictures = [PICTURE]
        answer = chat.session.ask("a", interrupt)
        assert answer.is_stopped
        assert [turn.answer for turn in chat.session.conversation.turns] == ["half"]
        assert chat.session.pictures == []
        chat.session.ask("b", ignore)
        assert chat.asked[-1][2:] == ["half", "b"]


def test_an_answer_stopped_before_its_first_word_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with Chat() as chat:

        def stopped(*_: object) -> Iterator[str]:
            yield from ()
            raise KeyboardInterrupt

        monkeypatch.setattr(chat.session.endpoint, "ask", stopped)
        chat.session.pictures = [PICTURE]
        assert chat.session.ask("a", ignore).is_stopped
        assert chat.session.conversation.turns == []
        assert chat.session.pictures == [PICTURE]


def test_an_empty_answer_is_an_answer() -> None:
    with Chat(said("")) as chat:
        chat.session.ask("a", ignore)
        assert chat.session.conversation.turns == [Turn("a", "")]


def test_retry_asks_again_with_the_settings_of_now(whole: Chat) -> None:
    whole.session.ask("a", ignore)
    whole.session.settings.set("max_tokens", "7")
    assert whole.session.retry(ignore).text == "two"
    assert whole.asked == [["s", "a"], ["s", "a"]]
    assert whole.server.bodies[1]["max_tokens"] == 7
    assert whole.session.conversation.turns == [Turn("a", "two")]


def test_a_retry_that_fails_leaves_the_answer_that_there_was() -> None:
    with Chat(said("one"), FAILED) as chat:
        chat.session.ask("a", ignore)
        with pytest.raises(ChatError):
            chat.session.retry(ignore)
        assert chat.session.conversation.turns == [Turn("a", "one")]


def test_retry_of_a_question_that_failed_takes_its_pictures_along() -> None:
    with Chat(FAILED, said("one"), said("two")) as chat:
        chat.session.pictures = [PICTURE]
        with pytest.raises(ChatError):
            chat.session.ask("a", ignore)
        chat.session.retry(ignore)
        chat.session.retry(ignore)
        question = [PICTURE.part(), {"type": "text", "text": "a"}]
        assert chat.asked == [["s", question]] * 3
        assert [turn.answer for turn in chat.session.conversation.turns] == ["two"]


def test_undo_and_clear(whole: Chat) -> None:
    session = whole.session
    for nothing in (session.undo, lambda: session.retry(ignore)):
        with pytest.raises(ChatError, match="there is no"):
            nothing()
    session.ask("a", ignore)
    session.ask("b", ignore)
    assert session.undo() == Turn("b", "two")
    assert session.conversation.turns == [Turn("a", "one")]
    session.pictures = [PICTURE]
    session.clear()
    assert session.conversation.messages() == [{"role": "system", "content": "s"}]
    assert session.pictures == []
