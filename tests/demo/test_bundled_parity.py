"""The bundled model answers as transformers does from the same files, and in a batch as alone, token for token.

`python -m tests.demo.parity` asks about 300 pictures.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from server.demo.checkpoint import ensure_demo
from server.demo.exam import EXERCISES
from tests.demo.parity import Compared, compare, table

PICTURES = 24


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> list[Compared]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        folder: Path = ensure_demo()
    return compare(folder, PICTURES)


def test_every_exercise_is_asked(compared: list[Compared]) -> None:
    assert {one.exercise for one in compared} == {"no picture", *(exercise.name for exercise in EXERCISES)}
    assert sum(one.num_pictures for one in compared) >= PICTURES
    assert all(one.theirs for one in compared)


def test_answers_are_those_of_transformers(compared: list[Compared]) -> None:
    assert [one.in_batch for one in compared] == [one.theirs for one in compared]


def test_answers_do_not_depend_on_the_batch(compared: list[Compared]) -> None:
    assert [one.in_batch for one in compared] == [one.alone for one in compared]


def test_the_table_counts_what_differs() -> None:
    same = Compared("numbers", 1, in_batch=[5, 2], alone=[5, 2], theirs=[5, 2])
    other = Compared("words", 2, in_batch=[5, 2], alone=[6, 2], theirs=[7, 2])
    assert table([same, other, same]).splitlines() == [
        "| 4 pictures | questions | as transformers' | 32 at once as alone |",
        "| --- | ---: | ---: | ---: |",
        "| numbers | 2 | 2 | 2 |",
        "| words | 1 | 0 | 0 |",
        "| all | 3 | 2 | 2 |",
    ]
