"""A picture in the making, which remembers where each letter and each word stands."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from server.demo.lexicon import PLACES
from server.demo.typefaces import Font

Color = tuple[int, int, int]

# By name, each the middle of what goes by that name.
COLORS: Mapping[str, Color] = {
    "red": (214, 32, 38),
    "green": (34, 150, 62),
    "blue": (36, 78, 214),
    "yellow": (246, 218, 34),
    "orange": (246, 136, 22),
    "purple": (128, 44, 168),
    "pink": (250, 142, 190),
    "brown": (120, 72, 34),
    "black": (16, 16, 18),
    "white": (248, 248, 248),
    "gray": (130, 132, 134),
}
_SPREAD = 16  # of a channel around the middle
_MIN_CONTRAST = 80.0  # of luminance, of 255


@dataclass(frozen=True)
class Glyph:
    """A letter and the pixel at its middle."""

    character: str
    x: float
    y: float


@dataclass(frozen=True)
class Word:
    """A word of the lexicon, by its place in it and in any case, and the pixel at its middle."""

    place: int
    x: float
    y: float


@dataclass(frozen=True)
class Mark:
    """A coloured shape, by the number of its kind and colour, and the pixel at its middle."""

    place: int
    x: float
    y: float


@dataclass
class Canvas:
    """An RGB picture and what is on it. `smallest` is the height of its smallest capitals, in pixels."""

    image: Image.Image
    glyphs: list[Glyph] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    smallest: float = float("inf")

    def __post_init__(self) -> None:
        self.draw = ImageDraw.Draw(self.image)

    def write(self, x: float, y: float, text: str, font: Font, fill: Color) -> None:
        """Draw one line of text that begins at x, and whose capitals have their tops at y."""
        capital = -font.getbbox("H", anchor="ls")[1]
        self.draw.text((x, y + capital), text, font=font, fill=fill, anchor="ls")
        self.smallest = min(self.smallest, capital)
        middle = y + capital / 2
        for word in text.split(" "):
            begin = x
            for character in word:
                advance = _advance(font, character)
                self.glyphs.append(Glyph(character, x + advance / 2, middle))
                x += advance
            place = PLACES.get(word.lower())
            if place is not None:
                self.words.append(Word(place, (begin + x) / 2, middle))
            x += _advance(font, " ")

    def resized(self, width: int, height: int) -> Canvas:
        """The same in another size, stretched where the ratio is another."""
        across, down = width / self.image.width, height / self.image.height
        return Canvas(
            self.image.resize((width, height), Image.Resampling.BILINEAR),
            glyphs=[Glyph(glyph.character, glyph.x * across, glyph.y * down) for glyph in self.glyphs],
            words=[Word(word.place, word.x * across, word.y * down) for word in self.words],
            marks=[Mark(mark.place, mark.x * across, mark.y * down) for mark in self.marks],
            smallest=self.smallest * down,
        )


@functools.lru_cache(maxsize=1 << 17)
def _advance(font: Font, character: str) -> float:
    """Pixels, without kerning: what is left out moves a letter's middle by less than the labels can tell."""
    return font.getlength(character)


def line_size(text: str, font: Font) -> tuple[float, float]:
    """Pixels to the right and downwards that `write` needs for `text`, tails of letters included."""
    _, top, right, bottom = font.getbbox(f"H{text}", anchor="ls")
    return max(right - font.getlength("H"), font.getlength(text)), bottom - top


def shade(name: str, chance: random.Random) -> Color:
    """One of the colours that go by this name."""
    red, green, blue = (min(255, max(0, value + chance.randint(-_SPREAD, _SPREAD))) for value in COLORS[name])
    return red, green, blue


def luminance(color: Color) -> float:
    """0 to 255, by the weights of ITU-R BT.601."""
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def contrasting(paper: Color, chance: random.Random) -> str:
    """The name of a colour that can be read on `paper`."""
    names = [name for name, color in COLORS.items() if abs(luminance(color) - luminance(paper)) >= _MIN_CONTRAST]
    return chance.choice(names or ["black" if luminance(paper) > 127 else "white"])


def blank(width: int, height: int, paper: Color, chance: random.Random) -> Canvas:
    """Paper of one colour, at times uneven or grainy."""
    kind = chance.random()
    if kind < 0.6:
        return Canvas(Image.new("RGB", (width, height), paper))
    noise = np.random.default_rng(chance.getrandbits(32))
    pixels = np.empty((height, width, 3), dtype=np.float32)
    pixels[:] = paper
    if kind < 0.8:
        slope = np.linspace(-1, 1, width if chance.random() < 0.5 else height, dtype=np.float32) * chance.uniform(5, 25)
        pixels += slope[None, :, None] if len(slope) == width else slope[:, None, None]
    else:
        pixels += noise.normal(0, chance.uniform(2, 9), size=(height, width, 1)).astype(np.float32)
    return Canvas(Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)))
