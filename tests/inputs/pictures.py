"""Pictures for the image tests, as files in memory."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from server.inputs.image_processor import cut_and_resize, named_tile
from server.types import ImageSettings, Tile


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def noise_png(width: int, height: int, seed: int = 0) -> bytes:
    return encoded(noise(width, height, seed), "PNG")


def make_tiles(image: Image.Image, *, split: bool, settings: ImageSettings) -> list[Tile]:
    """What a picture becomes, without processes in between."""
    pictures = cut_and_resize(image, split=split, settings=settings)
    return [named_tile(picture.height, picture.width, picture.tobytes()) for picture in pictures]


def as_data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def raw_png(
    size: tuple[int, int], *, depth: int, colour: int, rows: list[bytes], before: bytes = b"", interlaced: bool = False
) -> bytes:
    """A PNG from its samples, one bytes object a row, of the kinds that Pillow cannot write."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    return (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + before + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    )
