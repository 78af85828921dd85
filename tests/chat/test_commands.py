from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from server.chat.commands import Commands, Leave, with_pictures
from server.chat.conversation import Turn
from server.chat.endpoint import Endpoint
from server.chat.errors import ChatError
from server.chat.events import Answer
from server.chat.screen import Screen
from server.chat.session import Session
from server.chat.settings import Settings
from tests.bench.canned import CannedServer

PNG = b"\x89PNG\r\n\x1a\n rest"


class Desk:
    """Commands with everything around them but a server."""

    def __init__(self, url: str = "http://127.0.0.1:1") -> None:
        self._out = io.StringIO()
        self.session = Session(Endpoint(url), model="m", settings=Settings())
        self.retries = 0
        self.commands = Commands(self.session, Screen(self._out, styled=False), self._retry)

    def _retry(self) -> Answer:
        self.retries += 1
        return Answer(started=0.0)

    def run(self, line: str) -> str:
        """What it shows."""
        start = len(self._out.getvalue())
        self.commands.run(line)
        return self._out.getvalue()[start:].removesuffix("\n")

    def refused(self, line: str) -> str:
        with pytest.raises(ChatError) as caught:
            self.run(line)
        return str(caught.value)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my cat.png").write_bytes(PNG)
    (tmp_path / "a.png").write_bytes(PNG)
    return Desk()


@pytest.mark.parametrize(
    "spelling", ['"my cat.png"', "'my cat.png'", "my\\ cat.png", '~/"my cat.png"', " 'my cat.png' "]
)
def test_a_picture_is_attached_however_its_path_is_written(desk: Desk, spelling: str) -> None:
    assert desk.run(f"/image {spelling}") == "attached: my cat.png (detail auto, 13 bytes)"
    (picture,) = desk.session.pictures
    assert picture.url.startswith("data:image/png;base64,")


def test_the_detail_is_the_words_or_the_settings(desk: Desk) -> None:
    desk.run("/image a.png high")
    desk.run("/set detail low")
    desk.run("/image a.png")
    desk.run("/image http://a/b auto")
    assert [picture.detail for picture in desk.session.pictures] == ["high", "low", "auto"]


def test_a_picture_that_cannot_be_is_told_and_not_attached(desk: Desk) -> None:
    usage = "/image PATH_OR_URL [auto|low|high]; a path that holds spaces needs quotes"
    assert desk.refused("/image") == desk.refused("/image my cat.png") == desk.refused("/image a b c") == usage
    assert desk.refused('/image "a') == "a quote has no end"
    assert desk.refused("/image b.png") == "cannot read b.png: No such file or directory"
    assert desk.session.pictures == []


def test_attached_pictures_are_listed_and_dropped(desk: Desk) -> None:
    assert desk.run("/images") == "nothing is attached"
    assert desk.refused("/drop") == "nothing is attached"
    for place in ("a.png", "http://a/b", "http://a/c"):
        desk.run(f"/image {place}")
    assert desk.run("/images").splitlines()[1] == "2: http://a/b (detail auto)"
    assert desk.refused("/drop 0") == desk.refused("/drop 4") == desk.refused("/drop x")
    assert desk.run("/drop 2") == "taken away: http://a/b (detail auto)"
    assert [picture.name for picture in desk.session.pictures] == ["a.png", "http://a/c"]
    desk.run("/drop")
    assert desk.session.pictures == []


def test_the_system_message(desk: Desk) -> None:
    assert desk.run("/system") == "no system message"
    assert desk.run('/system Say "no".\nAlways.') == 'system message: Say "no".\nAlways.'
    assert desk.session.conversation.system == 'Say "no".\nAlways.'
    assert desk.run('/system ""') == "no system message"
    assert desk.session.conversation.system == ""


def test_settings(desk: Desk) -> None:
    assert "temperature 0.2" in desk.run("/set temperature 0.2")
    assert desk.session.settings.temperature == 0.2
    assert "temperature 0.2" in desk.run("/settings")
    assert desk.refused("/set temperature hot") == "temperature: must be a number, not 'hot'"
    assert desk.refused("/set temperature").startswith("/set NAME VALUE")


def test_the_model() -> None:
    with CannedServer(models=["m", "n\x1b[2J"]).running() as server:
        desk = Desk(server.url)
        assert desk.run("/model") == "* m\n  n␛[2J"
        assert desk.run("/model other") == "model: other"
        desk.session.endpoint.__exit__()
    assert desk.session.model == "other"


def test_what_was_said(desk: Desk) -> None:
    assert desk.run("/history") == "nothing has been said"
    desk.run("/system s")
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": "http://a"}},
        {"type": "text", "text": "what?"},
    ]
    desk.session.conversation.turns = [Turn(parts, "a cat\x07"), Turn("why?", "so")]
    assert desk.run("/history") == "system message: s\n> [1 picture] what?\na cat␇\n> why?\nso"
    assert desk.run("/undo") == "taken back: why?"
    assert len(desk.session.conversation.turns) == 1
    desk.run("/clear")
    assert desk.session.conversation.turns == []
    assert desk.refused("/undo") == "there is nothing to take back"


def test_saved_and_loaded(desk: Desk, tmp_path: Path) -> None:
    desk.session.conversation.turns = [Turn("a", "b")]
    file = tmp_path / "my chat.json"
    assert desk.run('/save "my chat.json"') == f"saved: 1 turns in {file}"
    assert json.loads(file.read_text()) == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    desk.run("/save ~/my\\ chat.json")  # its own file may be written again
    assert "is there already" in desk.refused("/save a.png")
    assert (tmp_path / "a.png").read_bytes() == PNG
    other = Desk()
    other.run("/image a.png")
    assert other.run("/load 'my chat.json'") == "loaded: 1 turns"
    assert other.session.conversation.turns == [Turn("a", "b")]
    assert other.session.pictures == []
    other.run("/save 'my chat.json'")
    assert other.refused("/load a.png").endswith("a.png is not JSON")
    assert other.refused("/load") == "/load FILE; a path that holds spaces needs quotes"


def test_retry_shows_an_answer(desk: Desk) -> None:
    desk.run("/retry")
    assert desk.retries == 1


def test_help_names_every_command_and_each_completes(desk: Desk) -> None:
    lines = desk.run("/help").splitlines()
    names = [line.split()[0] for line in lines if line.startswith("/")]
    assert len(names) == 15
    for name in names:
        assert f"{name} " in desk.commands.complete(name)


@pytest.mark.parametrize("line", ["/quit", "/quit  ", "/quit\n"])
def test_quit_leaves(desk: Desk, line: str) -> None:
    with pytest.raises(Leave):
        desk.run(line)


@pytest.mark.parametrize("line", ["/imag a.png", "/", "/etc/passwd what is it", "/QUIT"])
def test_an_unknown_command_is_told(desk: Desk, line: str) -> None:
    message = desk.refused(line)
    assert message.startswith(f"there is no command {line.split()[0]}; /help lists them.")


def test_a_command_that_takes_nothing_is_not_given_anything(desk: Desk) -> None:
    assert desk.refused("/undo it") == "/undo stands alone"


def test_pictures_stand_before_a_question() -> None:
    assert with_pictures("a", 0) == "a"
    assert with_pictures("a", 2) == "[2 pictures] a"
