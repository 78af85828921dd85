"""Scenes to look things up in: tables, receipts, small print."""

from __future__ import annotations

import random
from collections.abc import Sequence

from server.demo.canvas import Canvas, Color
from server.demo.lexicon import WORDS, number, price
from server.demo.scenes.studio import Question, Scene, Studio
from server.demo.typefaces import Font, load_font


def table(studio: Studio) -> Scene | None:
    """Names and numbers in rows, ruled or not, to look things up in."""
    chance = studio.chance
    money = chance.random() < 0.3
    return _ledger(studio, [price(chance) if money else number(chance) for _ in range(chance.randint(2, 9))])


def receipt(studio: Studio) -> Scene | None:
    """A shop's name, goods with prices, and their sum."""
    chance = studio.chance
    cents = [chance.randint(20, chance.choice((999, 999, 2999))) for _ in range(chance.randint(2, 7))]
    return _ledger(studio, [f"{value // 100}.{value % 100:02}" for value in cents], shop=chance.choice(WORDS))


def _ledger(studio: Studio, values: Sequence[str], *, shop: str = "") -> Scene | None:
    chance = studio.chance
    keys = chance.sample(WORDS, len(values))
    rows = list(zip(keys, values, strict=True))
    total = f"{sum(round(float(value) * 100) for value in values) / 100:.2f}"
    printed = [(key.capitalize() if chance.random() < 0.3 else key, value) for key, value in rows]
    if shop:
        printed = [(shop.upper(), ""), *printed, ("total", total)]
    canvas, _, ink = studio.paper()
    font = _fitting(studio, printed)
    if font is None:
        return None
    _print_rows(studio, canvas, printed, font, ink, ruled=not shop and chance.random() < 0.5)
    questions = [_look_up(chance, *row) for row in chance.sample(rows, min(len(rows), 3))]
    if values.count(value := chance.choice(values)) == 1:
        questions.append(Question(f"Which one has {value}?", keys[values.index(value)], "table"))
    if shop:
        questions.append(Question(chance.choice(("What is the total?", "How much is it in all?")), total, "table"))
        questions.append(Question("What is the name of the shop?", shop, "word"))
    else:
        questions.append(Question("How many rows are there?", str(len(rows)), "count lines"))
    if chance.random() < 0.2:
        whole = " ".join(f"{key} {value}".strip().lower() for key, value in printed)
        return Scene([canvas], [Question("Read all the text.", whole, "lines"), *chance.sample(questions, 1)])
    return Scene([canvas], chance.sample(questions, 3))


def _look_up(chance: random.Random, key: str, value: str, task: str = "table") -> Question:
    ask = (f"What is the value of {key}?", f"How much is {key}?", f"What is next to {key}?", f"What number has {key}?")
    return Question(chance.choice(ask), value, task)


def _fitting(studio: Studio, rows: Sequence[tuple[str, str]]) -> Font | None:
    chance = studio.chance
    largest = int(min(studio.max_letters, 26, (studio.height - 8) / (1.2 * len(rows))))
    if largest < studio.min_letters:
        return None
    name, size = chance.choice(studio.typefaces), chance.randint(studio.min_letters, largest)
    font = load_font(name, size)
    widest = max(font.getlength(f"{key}  {value}") for key, value in rows)
    if widest > studio.width - 12:
        size = int(size * (studio.width - 12) / widest)
    return load_font(name, size) if size >= studio.min_letters else None


def _print_rows(
    studio: Studio, canvas: Canvas, rows: Sequence[tuple[str, str]], font: Font, ink: Color, *, ruled: bool
) -> None:
    chance = studio.chance
    keys, values = (max(font.getlength(row[side]) for row in rows) for side in (0, 1))
    step = chance.uniform(1.2, max(1.2, min(1.9, (studio.height - 8) / (len(rows) * font.size)))) * font.size
    gap = chance.uniform(font.size * 0.5, max(font.size * 0.5, studio.width - keys - values - 10))
    left = chance.uniform(4, max(4, studio.width - keys - gap - values - 4))
    top = chance.uniform(4, max(4, studio.height - step * len(rows) - 4))
    to_the_right = chance.random() < 0.6
    for index, (key, value) in enumerate(rows):
        y = top + index * step
        canvas.write(left, y, key, font, ink)
        if value:
            shift = values - font.getlength(value) if to_the_right else 0.0
            canvas.write(left + keys + gap + shift, y, value, font, ink)
        if ruled:
            below = y + step - 2
            canvas.draw.line((left - 2, below, left + keys + gap + values + 2, below), fill=ink, width=1)


def page(studio: Studio) -> Scene | None:
    """Small print: words with a number each, in one column or several. What splitting is for."""
    chance = studio.chance
    canvas, _, ink = studio.paper()
    font = load_font(chance.choice(studio.typefaces), chance.randint(studio.min_letters, studio.min_letters + 3))
    step = font.size * chance.uniform(1.15, 1.5)
    room = min(int((studio.height - 6) // step), 14)
    if room < 2:
        return None
    count = chance.randint(2, room)
    keys, values = chance.sample(WORDS, 3 * count), [number(chance) for _ in range(3 * count)]
    entries = [f"{key} {value}" for key, value in zip(keys, values, strict=True)]
    gap = font.size * chance.uniform(0.8, 1.6)
    left, columns = 4.0, 0
    while columns < 3:
        column = entries[columns * count : (columns + 1) * count]
        width = max(font.getlength(entry) for entry in column)
        if left + width > studio.width - 4:
            break
        for index, entry in enumerate(column):
            canvas.write(left, 4 + index * step, entry, font, ink)
        left += width + gap
        columns += 1
    shown = columns * count
    if not shown:
        return None
    asked = chance.sample(range(shown), min(shown, 3))
    questions = [_look_up(chance, keys[index], values[index], "page") for index in asked]
    if values[:shown].count(values[asked[0]]) == 1:
        questions[0] = Question(f"Which one has {values[asked[0]]}?", keys[asked[0]], "page")
    return Scene([canvas], questions)
