"""What the demo model is judged by: the same questions each time, in typefaces of their own, marked to the letter."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from server.config import load_config
from server.demo import exam
from server.demo.exam import EXERCISES, Exercise, Item, answers_to, draw_items, examine, wrong_answers
from server.demo.typefaces import held_out_typefaces, load_font, training_typefaces
from server.launch import build_llm

BY_NAME = {exercise.name: exercise for exercise in EXERCISES}
NUMBERS = EXERCISES[0]


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_items_follow_the_seed_alone(exercise: Exercise) -> None:
    items = draw_items(exercise, 4, seed=3)
    assert draw_items(exercise, 4, seed=3) == items
    assert draw_items(exercise, 2, seed=3) == items[:2]
    assert draw_items(exercise, 4, seed=4) != items
    assert len({item.pictures[0] for item in items}) == 4


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.name)
def test_pictures_have_the_sides_that_the_exercise_asks_for(exercise: Exercise) -> None:
    for item in draw_items(exercise, 6, seed=0):
        for picture in item.pictures:
            sides = Image.open(io.BytesIO(picture)).size
            assert exercise.scale * exercise.shortest <= min(sides)
            assert max(sides) <= exercise.scale * 224


@pytest.mark.parametrize("name", ["small print", "colors and shapes, large"])
def test_both_details_are_asked_about_the_same_pictures(name: str) -> None:
    whole, split = BY_NAME[f"{name}, 1 tile"], BY_NAME[f"{name}, 5 tiles"]
    assert (whole.detail, split.detail) == ("low", "high")
    assert draw_items(whole, 6, seed=1) == draw_items(split, 6, seed=1)


def test_no_family_is_both_learnt_from_and_judged_by() -> None:
    learnt, judged = (
        {str(load_font(name, 20).getname()[0]).split()[0] for name in names}
        for names in (training_typefaces(), held_out_typefaces())
    )
    assert len(judged) >= 4
    assert learnt
    assert not learnt & judged


@pytest.mark.parametrize("exercise", [e for e in EXERCISES if "shapes" not in e.name and e.name != "counting to five"])
def test_letters_are_of_held_out_typefaces(exercise: Exercise, monkeypatch: pytest.MonkeyPatch) -> None:
    items = draw_items(exercise, 3, seed=0)
    monkeypatch.setattr(exam, "held_out_typefaces", training_typefaces)
    assert draw_items(exercise, 3, seed=0) != items


@pytest.mark.parametrize("said", ["47", " 47", "47\n"])
def test_an_answer_to_the_letter_is_right(said: str) -> None:
    assert wrong_answers([Item([b""], "What number is this?", "47")], [said]) == []


@pytest.mark.parametrize("said", ["", "4", "74", "47.", "4 7", "a 47", "047", "47 47"])
def test_any_other_answer_is_wrong(said: str) -> None:
    item = Item([b""], "What number is this?", "47")
    assert wrong_answers([item, item], [said, "47"]) == [(item, said)]


def test_shares_count_what_the_model_says(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights are right where what they say is what is asked for."""
    monkeypatch.setattr(exam, "MAX_ANSWER_TOKENS", 4)
    settings = {"engine_client": "thread", "warm_up": False, "max_model_len": 2048, "kv_cache_memory_gb": 0.05}
    llm = build_llm(load_config(flags={"model": str(tiny_checkpoint), "dtype": "float32", **settings}))
    items = draw_items(NUMBERS, 5, seed=0)
    lines: list[str] = []

    async def scenario() -> None:
        said = await answers_to(llm, items, "low")
        assert await examine(llm, count=5, seed=0, only=NUMBERS.name) == {NUMBERS.name: 0.0}
        asked = [replace(item, answer=answer.strip()) for item, answer in zip(items, said, strict=True)]
        asked[3] = replace(items[3], answer="something else")
        monkeypatch.setattr(exam, "draw_items", lambda exercise, count, seed: asked)
        shares = await examine(llm, count=5, seed=0, only=NUMBERS.name, show=lines.append)
        assert shares == {NUMBERS.name: pytest.approx(0.8)}
        assert lines == [f"{NUMBERS.name}: {items[3].question} 'something else', not {said[3]!r}"]

    async def run() -> None:
        await llm.start()
        try:
            await scenario()
        finally:
            await llm.close()

    asyncio.run(run())
