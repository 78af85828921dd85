"""Scenes to read: a number, a word, lines of both."""

from __future__ import annotations

import random
from collections.abc import Sequence

from server.demo.canvas import COLORS, Canvas, Color, contrasting, line_size, shade
from server.demo.lexicon import WORDS, number
from server.demo.scenes.studio import Question, Scene, Studio, paper_question
from server.demo.typefaces import Font, load_font


def one_number(studio: Studio) -> Scene | None:
    """A number of up to four digits, anywhere."""
    ask = ("What number is this?", "Which number is shown?", "Read the number.", "What number do you see?")
    return _one_text(studio, number(studio.chance), ask, "number")


def one_word(studio: Studio) -> Scene | None:
    """A word of the lexicon, anywhere."""
    chance = studio.chance
    word = chance.choice(WORDS)
    ask = ("What word is this?", "What does it say?", "Read the word.", "What is written here?")
    return _one_text(studio, word, ask, "word", printed=_in_case(word, chance))


def _in_case(word: str, chance: random.Random) -> str:
    return chance.choice((word, word, word.capitalize(), word.upper()))


def _one_text(studio: Studio, text: str, ask: Sequence[str], task: str, *, printed: str | None = None) -> Scene | None:
    chance, printed = studio.chance, printed or text
    canvas, paper, _ = studio.paper()
    ink = contrasting(COLORS[paper], chance)
    font = studio.font(printed, width=studio.width - 8, height=studio.height - 8)
    if font is None:
        return None
    put_anywhere(studio, canvas, printed, font, shade(ink, chance))
    questions = [Question(chance.choice(ask), text, task)]
    if chance.random() < 0.4:
        questions.append(_ink_question(chance, ink))
    if chance.random() < 0.2:
        questions.append(paper_question(chance, paper))
    chance.shuffle(questions)
    return Scene([canvas], questions)


def put_anywhere(studio: Studio, canvas: Canvas, text: str, font: Font, ink: Color) -> None:
    width, height = line_size(text, font)
    x = studio.chance.uniform(2, max(2, studio.width - width - 2))
    y = studio.chance.uniform(2, max(2, studio.height - height - 2))
    canvas.write(x, y, text, font, ink)


def _ink_question(chance: random.Random, ink: str) -> Question:
    ask = ("What color is the text?", "What colour are the letters?", "Which color is the writing?")
    return Question(chance.choice(ask), ink, "color")


def lines(studio: Studio) -> Scene | None:
    """Words and numbers, one a line or a few, to be read whole and by line."""
    chance = studio.chance
    canvas, _, ink = studio.paper()
    size = chance.randint(studio.min_letters, max(studio.min_letters, min(studio.max_letters, studio.height // 3)))
    name = chance.choice(studio.typefaces)
    font = load_font(name, size)
    step = size * chance.uniform(1.15, 1.8)
    room = int((studio.height - 6) // step)
    if room < 2:
        return None
    columns = chance.choice((1, 1, 2, 3))
    rows: list[str] = []
    for _ in range(chance.randint(2, min(room, 8))):
        row = ""
        for _ in range(columns):
            item = number(chance) if chance.random() < 0.35 else chance.choice(WORDS)
            joined = f"{row} {item}".strip()
            if font.getlength(joined) > studio.width - 8:
                break
            row = joined
        if not row:
            return None
        rows.append(row)
    left = chance.uniform(3, max(3, studio.width - 4 - max(font.getlength(row) for row in rows)))
    top = chance.uniform(3, max(3, studio.height - 3 - step * len(rows)))
    for index, row in enumerate(rows):
        canvas.write(left, top + index * step, row, font, ink)
    return Scene([canvas], _questions_on_lines(chance, rows))


_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")


def _questions_on_lines(chance: random.Random, rows: Sequence[str]) -> list[Question]:
    whole = Question(
        chance.choice(("Read all the text.", "What is written here?", "Read it.")), " ".join(rows), "lines"
    )
    index = chance.randrange(len(rows))
    line = Question(
        chance.choice((f"What is on line {index + 1}?", f"Read the {_ORDINALS[index]} line.")), rows[index], "line"
    )
    last = Question("What is the last line?", rows[-1], "line")
    count = Question("How many lines are there?", str(len(rows)), "count lines")
    items = [item for row in rows for item in row.split()]
    place = chance.randrange(len(items) - 1)
    after = Question(f"What comes after {items[place]}?", items[place + 1], "line")
    others = [line, last, count] if items.count(items[place]) > 1 else [line, last, count, after, after]
    return [whole, *chance.sample(others, 2)] if chance.random() < 0.7 else chance.sample(others, 2)
