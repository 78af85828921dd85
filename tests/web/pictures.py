"""Pictures for the tests, as bytes of PNG files."""

from __future__ import annotations

import io
import random

from PIL import Image, ImageDraw, ImageFont


def card(text: str = "4711", size: tuple[int, int] = (480, 320), *, colour: str = "#f4efe6") -> bytes:
    """`text` in large letters."""
    picture = Image.new("RGB", size, colour)
    font = ImageFont.load_default(size[1] // 3)
    ImageDraw.Draw(picture).text((size[0] / 2, size[1] / 2), text, font=font, fill="#223", anchor="mm")
    return encoded(picture)


def noise(width: int, height: int, seed: int = 0) -> bytes:
    """A picture that no format makes smaller."""
    return encoded(Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3)))


def encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
