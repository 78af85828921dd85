"""Scenes of two pictures to compare."""

from __future__ import annotations

from dataclasses import replace

from server.demo.canvas import Canvas, blank, shade
from server.demo.lexicon import number
from server.demo.scenes.studio import Question, Scene, Studio
from server.demo.scenes.texts import put_anywhere
from server.demo.shapes import KINDS, Figure, draw_figure


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
        put_anywhere(studio, canvas, text, font, ink)
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
