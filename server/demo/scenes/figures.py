"""Scenes of coloured shapes to name, find and count."""

from __future__ import annotations

import random
from collections.abc import Sequence

from server.demo.canvas import COLORS, blank, shade
from server.demo.scenes.studio import Question, Scene, Studio, paper_question
from server.demo.shapes import Figure, draw_figure, scatter


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
        questions.append(paper_question(chance, paper_name))
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
