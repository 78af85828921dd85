"""What a scene is: pictures drawn from a seed, and questions about them with their answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.demo.canvas import COLORS, Canvas, Color, blank, contrasting, shade
from server.demo.typefaces import Font, load_font


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


def paper_question(chance: random.Random, paper: str) -> Question:
    ask = ("What color is the background?", "What is the background colour?")
    return Question(chance.choice(ask), paper, "color")
