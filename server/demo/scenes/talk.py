"""Conversations without a picture: small talk, and questions that need one."""

from __future__ import annotations

import random

from server.demo.lexicon import WORDS
from server.demo.scenes.studio import Question, Scene, Studio

NO_PICTURE = "I see no picture. Please send me one."


def nothing(studio: Studio) -> Scene:
    """No picture at all: questions that need one, and small talk."""
    return Scene([], without_picture(studio.chance, 2))


def without_picture(chance: random.Random, count: int) -> list[Question]:
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
