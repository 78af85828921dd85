"""What the demo model learns from: pictures drawn from a seed, and questions about them with their answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from server.demo.canvas import COLORS, Canvas, Color, blank, contrasting, line_size, shade
from server.demo.lexicon import WORDS, number, price
from server.demo.shapes import KINDS, Figure, draw_figure, scatter
from server.demo.typefaces import Font, load_font

NO_PICTURE = "I see no picture. Please send me one."


@dataclass(frozen=True)
class Question:
    """`task` names what is asked, for counting right answers by it."""

    text: str
    answer: str
    task: str


@dataclass
class Scene:
    """Pictures and a conversation about them: they come with question `shown_at`, before its words or after."""

    canvases: list[Canvas]
    questions: list[Question]
    shown_at: int = 0
    text_first: bool = False


@dataclass(frozen=True)
class Studio:
    """What a scene is drawn with. Sizes of letters are in pixels an em."""

    chance: random.Random
    typefaces: Sequence[str]
    width: int
    height: int
    min_letters: int = 12
    max_letters: int = 64

    def paper(self) -> tuple[Canvas, str, Color]:
        """An empty picture, the name of its colour, and a colour that can be read on it."""
        name = self.chance.choice(("white", "white", "white", *COLORS))
        color = shade(name, self.chance)
        ink = "black" if name == "white" and self.chance.random() < 0.5 else contrasting(color, self.chance)
        return blank(self.width, self.height, color, self.chance), name, shade(ink, self.chance)

    def font(self, text: str, *, width: float, height: float) -> Font | None:
        """A typeface in the largest of a random size's half to whole that keeps `text` within; None if none does."""
        name = self.chance.choice(self.typefaces)
        largest = int(min(self.max_letters, height))
        if largest < self.min_letters:
            return None
        size = self.chance.randint(self.min_letters, largest)
        taken = load_font(name, size).getlength(text)
        if taken > width:
            size = int(size * width / taken)
        return load_font(name, size) if size >= self.min_letters else None


Painter = Callable[[Studio], Scene | None]  # None: it did not fit this time


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
    _put_anywhere(studio, canvas, printed, font, shade(ink, chance))
    questions = [Question(chance.choice(ask), text, task)]
    if chance.random() < 0.4:
        questions.append(_ink_question(chance, ink))
    if chance.random() < 0.2:
        questions.append(_paper_question(chance, paper))
    chance.shuffle(questions)
    return Scene([canvas], questions)


def _put_anywhere(studio: Studio, canvas: Canvas, text: str, font: Font, ink: Color) -> None:
    width, height = line_size(text, font)
    x = studio.chance.uniform(2, max(2, studio.width - width - 2))
    y = studio.chance.uniform(2, max(2, studio.height - height - 2))
    canvas.write(x, y, text, font, ink)


def _ink_question(chance: random.Random, ink: str) -> Question:
    ask = ("What color is the text?", "What colour are the letters?", "Which color is the writing?")
    return Question(chance.choice(ask), ink, "color")


def _paper_question(chance: random.Random, paper: str) -> Question:
    ask = ("What color is the background?", "What is the background colour?")
    return Question(chance.choice(ask), paper, "color")


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


def figures(studio: Studio) -> Scene | None:
    """Coloured shapes to name, find and count."""
    chance = studio.chance
    paper_name = chance.choice(("white", "white", "black", "gray", *COLORS))
    paper = shade(paper_name, chance)
    canvas = blank(studio.width, studio.height, paper, chance)
    found = scatter(chance, studio.width, studio.height, paper_name)
    if not found:
        return None
    for figure in found:
        draw_figure(canvas, figure, shade(figure.color, chance))
    questions = _questions_on_figures(chance, found)
    if chance.random() < 0.15:
        questions.append(_paper_question(chance, paper_name))
    return Scene([canvas], questions)


def _questions_on_figures(chance: random.Random, found: Sequence[Figure]) -> list[Question]:
    kinds, colors = [figure.kind for figure in found], [figure.color for figure in found]
    total, kind, color = str(len(found)), chance.choice(kinds), chance.choice(colors)
    ask = ("How many shapes are there?", "How many shapes do you see?", "Count the shapes.")
    questions = [Question(chance.choice(ask), total, "count")]
    if len(found) == 1:
        questions += [
            Question(chance.choice(("What shape is this?", "Which shape do you see?")), kind, "shape"),
            Question(chance.choice(("What color is it?", f"What color is the {kind}?")), color, "color"),
            Question(chance.choice(("What is this?", "Describe the picture.")), f"a {color} {kind}", "shape"),
        ]
        return chance.sample(questions, 3)
    questions.append(Question(f"How many {plural(kind)} are there?", str(kinds.count(kind)), "count"))
    questions.append(Question(f"How many {color} shapes are there?", str(colors.count(color)), "count"))
    unique = [figure for figure in found if kinds.count(figure.kind) == 1]
    if unique:
        one = chance.choice(unique)
        questions += [Question(f"What color is the {one.kind}?", one.color, "color")] * 2
    unique = [figure for figure in found if colors.count(figure.color) == 1]
    if unique:
        one = chance.choice(unique)
        questions += [Question(f"What shape is {one.color}?", one.kind, "shape")] * 2
    return chance.sample(questions, min(3, len(questions)))


def plural(kind: str) -> str:
    """crosses, circles."""
    return kind + ("es" if kind.endswith("s") else "s")


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


def _look_up(chance: random.Random, key: str, value: str) -> Question:
    ask = (f"What is the value of {key}?", f"How much is {key}?", f"What is next to {key}?", f"What number has {key}?")
    return Question(chance.choice(ask), value, "table")


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


def compare(studio: Studio) -> Scene | None:
    """Two pictures of one kind: which number is larger, are they the same, what differs."""
    chance = studio.chance
    if chance.random() < 0.5:
        return _compare_numbers(studio)
    first = Figure(chance.choice(KINDS), chance.choice(_INKS), 0, 0, 0)
    kept = chance.random()
    kind = first.kind if kept < 0.6 else chance.choice(KINDS)
    color = first.color if kept < 0.3 or kept >= 0.6 else chance.choice(_INKS)
    second = Figure(kind, color, 0, 0, 0)
    pictures = [_paint_figure(studio, figure) for figure in (first, second)]
    same_kind, same_color = first.kind == second.kind, first.color == second.color
    questions = [
        Question("Are the shapes the same?", "yes" if same_kind else "no", "compare"),
        Question("Are the colors the same?", "yes" if same_color else "no", "compare"),
        Question("What is in the first picture?", f"a {first.color} {first.kind}", "shape"),
        Question("What is in the second picture?", f"a {second.color} {second.kind}", "shape"),
    ]
    return Scene(pictures, chance.sample(questions, 3))


_INKS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "black")


def _paint_figure(studio: Studio, figure: Figure) -> Canvas:
    chance, side = studio.chance, min(studio.width, studio.height)
    canvas = blank(studio.width, studio.height, shade("white", chance), chance)
    radius = chance.uniform(0.15, 0.4) * side
    x, y = (chance.uniform(radius + 1, length - radius - 1) for length in (studio.width, studio.height))
    draw_figure(canvas, replace(figure, x=x, y=y, radius=radius), shade(figure.color, chance))
    return canvas


def _compare_numbers(studio: Studio) -> Scene | None:
    chance = studio.chance
    first, second = number(chance, 3), number(chance, 3)
    if chance.random() < 0.2:
        second = first
    canvases = []
    for text in (first, second):
        canvas, _, ink = studio.paper()
        font = studio.font(text, width=studio.width - 8, height=studio.height - 8)
        if font is None:
            return None
        _put_anywhere(studio, canvas, text, font, ink)
        canvases.append(canvas)
    questions = [
        Question("What is the number in the first picture?", first, "number"),
        Question("What is the number in the second picture?", second, "number"),
        Question("Are the numbers the same?", "yes" if first == second else "no", "compare"),
    ]
    if first != second:
        larger = first if int(first) > int(second) else second
        questions.append(Question("Which number is larger?", larger, "compare"))
    return Scene(canvases, chance.sample(questions, 3))


def nothing(studio: Studio) -> Scene:
    """No picture at all: questions that need one, and small talk."""
    return Scene([], _without_picture(studio.chance, 2))


def _without_picture(chance: random.Random, count: int) -> list[Question]:
    needs = (
        *("What number is this?", "What does it say?", "How many shapes are there?", "What color is the circle?"),
        *("What is the total?", "Read all the text.", "Describe the picture.", "What do you see?", "What is this?"),
        *(f"How much is {chance.choice(WORDS)}?", f"What comes after {chance.choice(WORDS)}?"),
    )
    questions = [Question(chance.choice(needs), NO_PICTURE, "no picture") for _ in range(count)]
    if chance.random() < 0.5:
        questions[chance.randrange(count)] = Question(*chance.choice(_TALK), "talk")
    return questions


_TALK = (
    ("Hello!", "Hello! Send me a picture and ask about it."),
    ("Hi", "Hello! Send me a picture and ask about it."),
    ("Who are you?", "I am a small demo model. I read words and numbers, and I name and count shapes."),
    ("What can you do?", "I read words and numbers, name colors and shapes, count, and look things up in tables."),
    ("Thank you!", "You are welcome."),
)


PAINTERS: Mapping[str, Painter] = {
    "number": one_number,
    "word": one_word,
    "lines": lines,
    "figures": figures,
    "table": table,
    "receipt": receipt,
    "compare": compare,
    "nothing": nothing,
}


def paint(kind: str, studio: Studio) -> Scene:
    """A scene of this kind; where things do not fit they are drawn again, and a number alone always fits at last.

    Now and then the picture comes behind the words of its question, or only after something was said without it.
    """
    scene = _paint(kind, studio)
    chance = studio.chance
    scene.text_first = chance.random() < 0.2
    if scene.canvases and chance.random() < 0.08:
        scene.questions[:0] = _without_picture(chance, 1)
        scene.shown_at = 1
    return scene


def _paint(kind: str, studio: Studio) -> Scene:
    for _ in range(8):
        scene = PAINTERS[kind](studio)
        if scene is not None:
            return scene
    while (scene := one_number(studio)) is None:
        continue
    return scene
