"""Pictures for the conformance cases: small files of one colour or of a scene, in every way that they can be stored."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
from PIL import Image

from tests.inputs.pictures import encoded, png_chunk, raw_png

RGB = tuple[int, int, int]
RED: RGB = (255, 0, 0)
BLUE: RGB = (0, 0, 255)
WHITE: RGB = (255, 255, 255)
GREY: RGB = (100, 100, 100)


def card(colour: RGB, size: tuple[int, int] = (8, 8)) -> bytes:
    """A PNG of one colour."""
    return encoded(Image.new("RGB", size, colour), "PNG")


def scene(seed: int, width: int = 120, height: int = 90) -> Image.Image:
    """A picture of soft colours, no two corners alike; a small file."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def scene_png(seed: int, width: int = 120, height: int = 90) -> bytes:
    return encoded(scene(seed, width, height), "PNG")


def png_of(file: bytes) -> bytes:
    """The first frame of any file as a plain PNG with the same pixels."""
    with Image.open(io.BytesIO(file)) as image:
        return encoded(image.convert("RGB"), "PNG")


def mean_colour(file: bytes) -> RGB:
    with Image.open(io.BytesIO(file)) as image:
        red, green, blue = np.asarray(image.convert("RGB")).reshape(-1, 3).mean(axis=0).round().astype(int).tolist()
    return red, green, blue


def palette_png(colour: RGB, *, alpha: int | None = None) -> bytes:
    chunks = png_chunk(b"PLTE", bytes(colour))
    if alpha is not None:
        chunks += png_chunk(b"tRNS", bytes([alpha]))
    return raw_png((8, 8), depth=8, colour=3, rows=[b"\0" * 8] * 8, before=chunks)


def deep_png(colour: int | RGB) -> bytes:
    """16 bits a sample, grey or RGB, from 8-bit values."""
    samples = [colour] * 8 if isinstance(colour, int) else [*colour] * 8
    row = struct.pack(f">{len(samples)}H", *(sample * 257 for sample in samples))
    return raw_png((8, 8), depth=16, colour=0 if isinstance(colour, int) else 2, rows=[row] * 8)


def interlaced_png(colour: RGB) -> bytes:
    """Of 2 × 2 pixels, in three of the seven passes."""
    return raw_png((2, 2), depth=8, colour=2, rows=[bytes(colour), bytes(colour), bytes(colour) * 2], interlaced=True)


def ycck_jpeg(colour: RGB) -> bytes:
    """As Adobe writes it: inverted, three of its channels as YCbCr, as the Adobe segment's last byte says."""
    inverted = tuple(255 - sample for sample in colour)
    y, cb, cr = Image.new("RGB", (1, 1), inverted).convert("YCbCr").getpixel((0, 0))  # type: ignore[misc]
    stored = Image.new("CMYK", (16, 16), (255 - y, 255 - cb, 255 - cr, 0))
    data = bytearray(encoded(stored, "JPEG", quality=98))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


def cmyk_jpeg(colour: RGB) -> bytes:
    inverted = tuple(255 - sample for sample in colour)
    return encoded(Image.new("CMYK", (16, 16), (*inverted, 0)), "JPEG", quality=98)


def jpeg(image: Image.Image, **options: Any) -> bytes:
    return encoded(image, "JPEG", quality=95, **options)


def turned_jpeg(image: Image.Image, orientation: int) -> bytes:
    """A file that says how it must be turned to stand upright."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return jpeg(image, exif=exif)


# What a file with this orientation shows, from how its pixels are stored [height, width, 3].
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


def upright_png(file: bytes, orientation: int) -> bytes:
    """How a file with that orientation must be seen, worked out here from its pixels as they are stored."""
    with Image.open(io.BytesIO(file)) as image:
        stored = np.asarray(image.convert("RGB"))
    return encoded(Image.fromarray(np.ascontiguousarray(UPRIGHT[orientation](stored))), "PNG")


def animation(file_format: str, *colours: RGB) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in colours]
    options = {"lossless": True} if file_format == "WEBP" else {}
    return encoded(frames[0], file_format, save_all=True, append_images=frames[1:], duration=100, **options)


def huge_png(width: int, height: int) -> bytes:
    """A file that claims its size; what it holds is next to nothing."""
    return raw_png((width, height), depth=1, colour=0, rows=[b"\0" * 100])


def huge_gif() -> bytes:
    """A screen of 65535 × 65535 around a frame of 1 × 1."""
    screen = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00;"
