from __future__ import annotations

import builtins
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.chat import line_editor
from server.chat.line_editor import History, LineEditor, history_file


def test_where_the_history_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert history_file({"XDG_STATE_HOME": "/state"}) == Path("/state/idefics2-server/chat_history")
    at_home = Path("/home/me/.local/state/idefics2-server/chat_history")
    assert history_file({}) == history_file({"XDG_STATE_HOME": "relative"}) == at_home


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "state" / "chat_history")


@pytest.fixture
def file(history: History) -> Path:
    return history._file


def test_entries_come_back_whatever_they_hold(history: History) -> None:
    entries = ["a", "two\nlines \\", "hä\u2028ß \udcff"]
    assert history.load() == []
    for entry in entries:
        history.add(entry)
    assert history.load() == entries


def test_only_the_owner_may_read_it(history: History, file: Path) -> None:
    history.add("a")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    file.chmod(0o644)
    history.add("b")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_not_even_for_a_moment_may_others_read_it(
    history: History, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fchmod", lambda *_: None)
    history.add("a")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_long_file_is_shortened_and_stays_the_owners(
    history: History, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_editor, "MAX_ENTRIES", 3)
    for number in range(7):
        history.add(str(number))
    assert history.load() == ["4", "5", "6"]
    assert len(file.read_text().splitlines()) == 3
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [entry.name for entry in file.parent.iterdir()] == ["chat_history"]


def test_lines_that_are_none_of_ours_are_left_out(history: History, file: Path) -> None:
    history.add("a")
    with file.open("ab") as out:
        out.write(b'{"b": 1}\n"cut\n\xff\n"c"\n')
    assert history.load() == ["a", "c"]


def test_a_disk_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    history = History(tmp_path / "file" / "chat_history")
    history.add("a")
    assert history.load() == []


class Typist:
    """Stands for `input`: gives these lines and keeps the prompts."""

    def __init__(self, *lines: str) -> None:
        self._lines: Iterator[str] = iter(lines)
        self.prompts: list[str] = []

    def __call__(self, prompt: str) -> str:
        self.prompts.append(prompt)
        return next(self._lines)


@pytest.mark.parametrize("has_readline", [True, False])
def test_a_backslash_at_the_end_goes_on(
    history: History, file: Path, monkeypatch: pytest.MonkeyPatch, has_readline: bool
) -> None:
    if not has_readline:
        monkeypatch.setattr(line_editor, "readline", None)
    typist = Typist("one\\", "two \\", "", "pasted\nlines", "", "pasted\nlines")
    monkeypatch.setattr(builtins, "input", typist)
    editor = LineEditor(lambda line: [], history)
    assert editor.read("[1 picture] > ") == "one\ntwo \n"
    assert typist.prompts == ["[1 picture] > ", ". ", ". "]
    assert [editor.read() for _ in range(3)] == ["pasted\nlines", "", "pasted\nlines"]
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert kept == ["one\ntwo \n", "pasted\nlines"]  # neither nothing nor the same again


def test_without_history_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtins, "input", Typist("a"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert LineEditor(lambda line: [], None).read() == "a"
    assert list(tmp_path.iterdir()) == []


def test_matches_leave_out_what_stands_before_the_word(monkeypatch: pytest.MonkeyPatch) -> None:
    readline = pytest.importorskip("readline")
    editor = LineEditor(lambda line: [f"{line}t.png", f"{line}r.png"], None)
    line = "/image my\\ ca"
    monkeypatch.setattr(readline, "get_line_buffer", lambda: line + " behind")
    monkeypatch.setattr(readline, "get_endidx", lambda: len(line))
    monkeypatch.setattr(readline, "get_begidx", lambda: len("/image my\\ "))
    assert [editor._match("ca", state) for state in range(3)] == ["cat.png", "car.png", None]
