from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from server.chat.completion import complete, complete_path

NAMES = ("/image", "/images", "/system", "/save")


def completed(line: str) -> list[str]:
    return complete(line, names=NAMES, with_paths=("/image", "/save"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my pictures").mkdir()
    (tmp_path / "my pictures" / "it's.png").touch()
    (tmp_path / "cat.png").touch()
    (tmp_path / "car.png").touch()
    (tmp_path / ".hidden").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_names_of_commands() -> None:
    assert completed("/im") == ["/image ", "/images "]
    assert completed("/s") == ["/save ", "/system "]
    assert completed("hello") == completed("") == completed("/x") == []


def test_only_commands_with_a_path_complete_one(folder: Path) -> None:
    assert completed("/image ca") == ["/image car.png", "/image cat.png"]
    assert completed("/save cat") == ["/save cat.png"]
    assert completed("/system ca") == completed("look at ca") == []


def test_paths_in_folders_and_at_home(folder: Path) -> None:
    assert complete_path("") == ["car.png", "cat.png", "my\\ pictures/"]
    assert complete_path(".h") == [".hidden"]
    assert complete_path("~/cat") == ["~/cat.png"]
    assert complete_path(f"{folder}/cat") == [f"{folder}/cat.png"]
    assert complete_path("./cat") == ["./cat.png"]
    assert complete_path("nowhere/") == complete_path("~nobody-here/") == complete_path("a\0/") == []


@pytest.mark.parametrize(
    ("typed", "written"),
    [
        ("my", "my\\ pictures/"),
        ("my\\ pi", "my\\ pictures/"),
        ('"my pi', '"my pictures/'),
        ("my\\ pictures/i", "my\\ pictures/it\\'s.png"),
        ('"my pictures/i', '"my pictures/it\'s.png"'),
    ],
)
def test_what_is_completed_is_what_the_parser_reads(folder: Path, typed: str, written: str) -> None:
    assert complete_path(typed) == [written]
    whole = written + (typed[0] if typed[0] == '"' and written.endswith("/") else "")
    (word,) = shlex.split(whole)
    assert (folder / word).exists()


def test_the_word_behind_a_path_is_no_path(folder: Path) -> None:
    (folder / "cat.png car").touch()
    assert completed("/image cat.png ca") == []
