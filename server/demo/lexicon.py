"""The words that the demo model learns to read: each one token of the family's tokenizer."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

WORDS: tuple[str, ...] = tuple(Path(__file__).with_name("words.txt").read_text(encoding="ascii").split())
PLACES: Mapping[str, int] = {word: index for index, word in enumerate(WORDS)}


def number(chance: random.Random, max_digits: int = 4) -> str:
    """A number of 1 to `max_digits` digits; each length is as likely as another."""
    digits = chance.randint(1, max_digits)
    return str(chance.randint(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1))


def price(chance: random.Random) -> str:
    """An amount of money with two decimals, below 100."""
    return f"{chance.randint(0, chance.choice((9, 9, 99)))}.{chance.randint(0, 99):02}"
