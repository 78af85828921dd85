"""Coloured shapes: where they stand and how they are drawn."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from server.demo.canvas import COLORS, Canvas, Color, Mark

KINDS = ("circle", "square", "triangle", "star", "diamond", "cross", "heart", "ring")
MAX_FIGURES = 6
LOOKS = {(kind, color): index for index, (kind, color) in enumerate(itertools.product(KINDS, COLORS))}
# Pairs that look alike once each has been varied a little.
_ALIKE = {frozenset(pair) for pair in (("white", "gray"), ("black", "brown"), ("red", "brown"), ("red", "orange"))}


@dataclass(frozen=True)
class Figure:
    """A shape with its middle and half its size in pixels."""

    kind: str
    color: str
    x: float
    y: float
    radius: float


def scatter(chance: random.Random, width: int, height: int, paper: str) -> list[Figure]:
    """1 to 6 figures that do not touch, none in the paper's colour; at times all of a kind, or of a colour."""
    colors = [name for name in COLORS if name != paper and frozenset((name, paper)) not in _ALIKE]
    count = chance.randint(1, MAX_FIGURES)
    kinds = [chance.choice(KINDS)] if chance.random() < 0.3 else chance.sample(KINDS, 3)
    if chance.random() < 0.2:
        colors = [chance.choice(colors)]
    side = min(width, height)
    figures: list[Figure] = []
    for _ in range(count * 20):
        if len(figures) == count:
            break
        radius = chance.uniform(0.09, 0.30 if count < 3 else 0.17) * side
        x, y = chance.uniform(radius + 2, width - radius - 2), chance.uniform(radius + 2, height - radius - 2)
        if all(math.hypot(x - other.x, y - other.y) > 1.25 * (radius + other.radius) + 2 for other in figures):
            figures.append(Figure(chance.choice(kinds), chance.choice(colors), x, y, radius))
    return figures


def draw_figure(canvas: Canvas, figure: Figure, fill: Color) -> None:
    """Draw it, at four times the size and then reduced, so that edges are smooth."""
    scale = 4
    size = math.ceil(2 * figure.radius) + 2
    from PIL import Image, ImageDraw

    mask = Image.new("L", (size * scale, size * scale), 0)
    draw = ImageDraw.Draw(mask)
    middle, radius = size * scale / 2, figure.radius * scale
    if figure.kind in ("circle", "ring"):
        draw.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), fill=255)
        if figure.kind == "ring":
            inner = radius * 0.55
            draw.ellipse((middle - inner, middle - inner, middle + inner, middle + inner), fill=0)
    else:
        points = [(middle + x * radius, middle + y * radius) for x, y in _outline(figure.kind)]
        draw.polygon(points, fill=255)
    small = mask.resize((size, size), Image.Resampling.BOX)
    corner = (round(figure.x - size / 2), round(figure.y - size / 2))
    canvas.image.paste(Image.new("RGB", (size, size), fill), corner, small)
    canvas.marks.append(Mark(LOOKS[figure.kind, figure.color], figure.x, figure.y))


def _outline(kind: str) -> Sequence[tuple[float, float]]:
    """Corners within the unit circle."""
    if kind == "square":
        return [(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)]
    if kind == "triangle":
        return [(0, -1), (0.95, 0.75), (-0.95, 0.75)]
    if kind == "diamond":
        return [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)]
    if kind == "cross":
        arm = 0.3
        return [
            *((-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)),
            *((arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)),
        ]
    if kind == "star":
        turns = [(-90 + 36 * index, 1.0 if index % 2 == 0 else 0.42) for index in range(10)]
        return [(r * math.cos(math.radians(a)), r * math.sin(math.radians(a))) for a, r in turns]
    if kind == "heart":
        curve = [2 * math.pi * step / 48 for step in range(48)]
        return [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17,
            )
            for t in curve
        ]
    raise KeyError(kind)
