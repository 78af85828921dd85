"""The chat in a real pseudo-terminal, against a server that answers what the test says."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.responses import JSONResponse

from tests.bench.canned import DONE, CannedServer, event, role, text, usage
from tests.bench.canned import Answer as Script
from tests.chat.terminal import CTRL_C, CTRL_D, TAB, UP, Terminal, chatting, plain
from tests.inputs.pictures import noise_png
from tests.listening import wait_until


def said(word: str, reason: str = "stop") -> Script:
    return [role(), text(word, reason), usage(7, 3, 4) + DONE]


@pytest.fixture(scope="module")
def canned() -> Iterator[CannedServer]:
    with CannedServer().running() as server:
        yield server


@pytest.fixture
def server(canned: CannedServer) -> CannedServer:
    canned.bodies.clear()
    canned.script = lambda _: said("an answer")
    return canned


@pytest.fixture
def terminal(server: CannedServer, tmp_path: Path) -> Iterator[Terminal]:
    with chatting(tmp_path, "--base-url", server.url) as terminal:
        shown = terminal.prompt()
        assert f"canned at {server.url}. /help lists the commands, Ctrl-D leaves." in shown
        yield terminal


def asked(server: CannedServer) -> list[object]:
    """The contents of the last request's messages."""
    return [message["content"] for message in server.bodies[-1]["messages"]]


def test_text_is_shown_as_it_arrives_and_what_it_cost(terminal: Terminal, server: CannedServer) -> None:
    server.script = lambda _: [role(), text("first "), 1.0, text("sëcond", "length"), usage(7, 3, 4) + DONE]
    terminal.enter("What?")
    terminal.until("first ")
    assert server.in_flight == 1
    shown = terminal.prompt()
    assert "\x1b[2m7 prompt tokens (4 cached), 3 completion tokens, first after " in shown
    assert plain(shown).startswith("sëcond\n7 prompt")
    assert "tokens/s, finish reason: length\n" in plain(shown)
    terminal.enter("And?")
    terminal.prompt()
    assert asked(server) == ["What?", "first sëcond", "And?"]
    assert terminal.leave() == 0


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(terminal: Terminal, server: CannedServer) -> None:
    server.script = lambda _: [role(), text("half of"), 60.0]
    terminal.enter("What?")
    terminal.until("half of")
    terminal.type(CTRL_C)
    assert "stopped: what was said is kept" in terminal.prompt()
    wait_until(lambda: server.in_flight == 0)  # the server is told
    server.script = lambda _: [60.0]
    terminal.enter("More")
    wait_until(lambda: server.in_flight == 1)
    terminal.type(CTRL_C)
    assert "stopped: nothing was said, so the question is not kept" in terminal.prompt()
    server.script = lambda _: said("on")
    terminal.enter("Go on")
    terminal.prompt()
    assert asked(server) == ["What?", "half of", "Go on"]


def test_ctrl_c_clears_the_line_and_ctrl_d_leaves(terminal: Terminal, server: CannedServer) -> None:
    terminal.type("never sent")
    terminal.until("never sent")
    terminal.clear_line()
    terminal.enter("one \\")
    terminal.until(". ")
    terminal.clear_line()  # the line before goes too
    terminal.enter("")
    terminal.enter("sent")
    terminal.until("prompt tokens")
    terminal.prompt()
    assert asked(server) == ["sent"]
    terminal.type(CTRL_D)
    assert terminal.end() == 0
    assert len(server.bodies) == 1
    assert terminal.raw.endswith(b"\n")


def test_no_sequence_of_the_servers_reaches_the_terminal(terminal: Terminal, server: CannedServer) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\x9b2J\rover\x08"
    server.script = lambda _: [text(evil[:3]), text(evil[3:] + "\tend\n", "\x1b[3J"), usage(1, 1) + DONE]
    terminal.enter("What?")
    shown = terminal.prompt()
    assert "␛]0;owned␇␛[2J�2Jover␈\tend\r\n" in shown
    assert "finish reason: ␛[3J" in shown
    server.script = lambda _: [event({"error": {"message": "\x1b]0;error\x07"}})]
    terminal.enter("What?")
    assert "! the server ended the answer: ␛]0;error␇" in terminal.prompt()
    server.script = lambda _: JSONResponse({"error": {"message": "\x1b]0;body\x07"}}, 500)
    terminal.enter("What?")
    assert "! HTTP 500: ␛]0;body␇" in terminal.prompt()
    terminal.enter("/history")
    terminal.prompt()  # stands before the question
    assert "␛]0;owned␇" in terminal.prompt()
    assert terminal.leave() == 0
    assert b"\x1b]" not in terminal.raw
    assert b"\x1b[2J" not in terminal.raw
    assert b"\x1b[3J" not in terminal.raw
    assert b"\x07" not in terminal.raw


def test_a_picture_stays_attached_until_it_is_answered(
    terminal: Terminal, server: CannedServer, tmp_path: Path
) -> None:
    file = tmp_path / "my cat.png"
    file.write_bytes(noise_png(8, 8))
    terminal.enter("/image /nowhere.png")
    assert "! cannot read /nowhere.png: No such file or directory\r\n" in terminal.prompt()
    terminal.enter(f"/image '{file}' low")
    assert "attached: my cat.png (detail low, " in terminal.until("[1 picture] > ")
    server.script = lambda _: JSONResponse({"error": {"message": "full"}}, 429, headers={"Retry-After": "7"})
    terminal.enter("What?")
    shown = terminal.until("[1 picture] > ")
    assert "! HTTP 429: full\r\nthe server asks to try again in 7 s (Retry-After)\r\n" in shown
    server.script = lambda _: said("a cat")
    terminal.enter("/retry")
    assert "a cat" in terminal.prompt()
    (question,) = asked(server)
    assert isinstance(question, list)
    assert [part["type"] for part in question] == ["image_url", "text"]
    assert question[0]["image_url"]["url"].startswith("data:image/png;base64,")
    terminal.enter("/imag x")
    assert "! there is no command /imag; /help lists them." in terminal.prompt()
    assert len(server.bodies) == 2


def test_what_is_typed_need_not_be_utf8(terminal: Terminal, server: CannedServer) -> None:
    terminal.type_bytes(b"\x1b[200~a \xff b\x1b[201~\r")
    terminal.until("prompt tokens")
    assert asked(server) == ["a � b"]


def test_several_lines_are_one_message(terminal: Terminal, server: CannedServer) -> None:
    terminal.enter("one\\")
    terminal.until(". ")
    terminal.enter("twö")
    terminal.prompt()
    assert asked(server) == ["one\ntwö"]
    terminal.enter("/clear")
    terminal.prompt()
    terminal.enter("\x1b[200~pasted\rlines\r\rhere\x1b[201~")
    terminal.until("prompt tokens")
    terminal.prompt()
    assert asked(server) == ["pasted\nlines\n\nhere"]


def test_tab_completes_commands_and_paths(terminal: Terminal, tmp_path: Path) -> None:
    folder = tmp_path / "my pictures"
    folder.mkdir()
    (folder / "kitten.png").write_bytes(noise_png(8, 8))
    terminal.type("/imag" + TAB)  # /image or /images: up to there
    terminal.type(f" {tmp_path}/my" + TAB)
    terminal.until("my\\ pictures/")
    terminal.type("kit" + TAB)
    terminal.until("kitten.png")
    terminal.enter(" high")
    assert "attached: kitten.png (detail high, " in terminal.until("[1 picture] > ")


def test_what_was_typed_is_found_again_by_its_owner_alone(server: CannedServer, tmp_path: Path) -> None:
    file = tmp_path / "state" / "idefics2-server" / "chat_history"
    with chatting(tmp_path, "--base-url", server.url) as terminal:
        terminal.prompt()
        terminal.enter("earlier")
        terminal.prompt()
        assert terminal.leave() == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [json.loads(line) for line in file.read_text().splitlines()] == ["earlier"]
    with chatting(tmp_path, "--base-url", server.url) as terminal:
        terminal.prompt()
        terminal.type(UP)
        terminal.until("earlier")
        terminal.enter(" and later")
        terminal.prompt()
        assert asked(server) == ["earlier and later"]
    kept = file.read_text()
    with chatting(tmp_path, "--base-url", server.url, "--no-history") as terminal:
        terminal.prompt()
        terminal.enter("secret")
        terminal.prompt()
        terminal.type(UP)  # of this chat alone
        terminal.until("secret")
    assert file.read_text() == kept


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}], ids=str)
def test_plain_terminals_get_plain_lines(server: CannedServer, tmp_path: Path, environment: dict[str, str]) -> None:
    with chatting(tmp_path, "--base-url", server.url, **environment) as terminal:
        terminal.prompt()
        terminal.enter("What?")
        assert "an answer\r\n7 prompt tokens" in terminal.prompt()
        assert b"\x1b[2m" not in terminal.raw
        if "TERM" in environment:
            assert b"\x1b" not in terminal.raw
        terminal.enter("/quit")
        assert terminal.end() == 0


def test_no_server_is_told_and_nothing_begins(tmp_path: Path) -> None:
    with chatting(tmp_path, "--base-url", "http://127.0.0.1:1") as terminal:
        assert terminal.end() == 1
        assert b"chat: nothing listens at http://127.0.0.1:1 (connection refused)" in terminal.raw
