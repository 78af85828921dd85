from __future__ import annotations

import random
import re
import struct
import time
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageCms

from server.errors import ClientError
from server.inputs.image_decode import MAX_SIDE, decode_rgb
from tests.inputs.pictures import encoded, noise, png_chunk, raw_png

LIMIT = 40_000_000
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def refusal(data: bytes, *, max_pixels: int = LIMIT) -> ClientError:
    with pytest.raises(ClientError) as caught:
        decode_rgb(data, max_pixels=max_pixels)
    assert caught.value.status == 400
    # Nothing of the decoder's own words: no addresses, paths or reprs.
    assert not re.search(r"0x[0-9a-f]|/|<|object at|\.py|[Ee]rror", caught.value.message)
    return caught.value


def pixels_of(data: bytes) -> list[tuple[int, int, int]]:
    image = decode_rgb(data, max_pixels=LIMIT)
    assert image.mode == "RGB"
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def blended(colour: tuple[int, int, int], alpha: int) -> tuple[int, ...]:
    return tuple(round((sample * alpha + 255 * (255 - alpha)) / 255) for sample in colour)


def assert_close(pixel: tuple[int, ...], expected: tuple[int, ...], tolerance: int) -> None:
    assert max(abs(a - b) for a, b in zip(pixel, expected, strict=True)) <= tolerance, (pixel, expected)


# --- modes: each with a colour that says whether it was read rightly ---


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, WHITE),
        ("1", 0, (0, 0, 0)),
        ("L", 77, (77, 77, 77)),
        ("LA", (0, 128), blended((0, 0, 0), 128)),
        ("LA", (90, 255), (90, 90, 90)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBA", (255, 0, 0, 0), WHITE),  # what lies under full transparency must not show
        ("RGBA", (255, 0, 0, 64), blended(RED, 64)),
        ("RGBA", (9, 8, 7, 255), (9, 8, 7)),
        ("I;16", 65535, WHITE),
        ("I;16", 257 * 100, (100, 100, 100)),
        ("I;16", 255, (1, 1, 1)),  # clipped instead of scaled, it would be white
    ],
)
def test_png_modes(mode: str, colour: int | tuple[int, ...], expected: tuple[int, int, int]) -> None:
    assert pixels_of(encoded(Image.new(mode, (2, 2), colour), "PNG")) == [expected] * 4


def test_16_bit_grey_ramp() -> None:
    ramp = struct.pack(">256H", *(level * 257 for level in range(256)))
    assert pixels_of(raw_png((256, 1), depth=16, colour=0, rows=[ramp])) == [(level,) * 3 for level in range(256)]


def test_16_bit_colour() -> None:
    row = struct.pack(">6H", 65535, 0, 0, 0, 0x8080, 65535)
    assert pixels_of(raw_png((2, 1), depth=16, colour=2, rows=[row])) == [RED, (0, 128, 255)]
    row = struct.pack(">8H", 65535, 0, 0, 65535, 65535, 0, 0, 0)
    assert pixels_of(raw_png((2, 1), depth=16, colour=6, rows=[row])) == [RED, WHITE]


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palettes(depth: int) -> None:
    palette = png_chunk(b"PLTE", bytes([*RED, *GREEN]))
    row = bytes([0b01000000]) if depth == 1 else bytes([1 << (8 - 2 * depth)]) if depth < 8 else b"\0\1"
    opaque = raw_png((2, 1), depth=depth, colour=3, rows=[row], before=palette)
    assert pixels_of(opaque) == [RED, GREEN]
    see_through = raw_png((2, 1), depth=depth, colour=3, rows=[row], before=palette + png_chunk(b"tRNS", b"\0"))
    assert pixels_of(see_through) == [WHITE, GREEN]
    half = raw_png((2, 1), depth=depth, colour=3, rows=[row], before=palette + png_chunk(b"tRNS", b"\x80\xff"))
    assert pixels_of(half) == [blended(RED, 128), GREEN]


@pytest.mark.parametrize(
    ("depth", "row", "key", "expected"),
    [
        (1, b"\x40", 0, [255, 255]),
        (2, bytes([0b01100000]), 2, [85, 255]),
        (4, b"\x37", 3, [255, 119]),
        (8, b"\x70\x07", 7, [112, 255]),
        (16, struct.pack(">2H", 0x1234, 257 * 50), 0x1234, [255, 50]),
    ],
)
def test_grey_with_a_transparent_level(depth: int, row: bytes, key: int, expected: list[int]) -> None:
    chunk = png_chunk(b"tRNS", struct.pack(">H", key))
    pixels = pixels_of(raw_png((2, 1), depth=depth, colour=0, rows=[row], before=chunk))
    assert pixels == [(level,) * 3 for level in expected]


@pytest.mark.parametrize(("depth", "code"), [(8, ">6B"), (16, ">6H")])
def test_colour_with_a_transparent_colour(depth: int, code: str) -> None:
    top = 2**depth - 1
    row = struct.pack(code, top, 0, 0, 0, top, 0)
    chunk = png_chunk(b"tRNS", struct.pack(">3H", 0, top, 0))
    assert pixels_of(raw_png((2, 1), depth=depth, colour=2, rows=[row], before=chunk)) == [RED, WHITE]


def test_interlaced_png() -> None:
    # 2 × 2 pixels in three of Adam7's seven passes: top-left, top-right, bottom row.
    rows = [bytes(RED), bytes(GREEN), bytes([*BLUE, *WHITE])]
    assert pixels_of(raw_png((2, 2), depth=8, colour=2, rows=rows, interlaced=True)) == [RED, GREEN, BLUE, WHITE]


def test_cmyk_and_ycck_jpeg() -> None:
    cmyk = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    for pixel in pixels_of(cmyk):
        assert_close(pixel, RED, 3)
    # YCCK as Adobe writes it: all four channels inverted, the first three then turned into YCbCr. Pillow inverts
    # what it saves, so the values are given inverted; the last byte of the Adobe segment says YCCK.
    y, cb, cr = Image.new("RGB", (1, 1), (0, 255, 255)).convert("YCbCr").getpixel((0, 0))
    data = bytearray(encoded(Image.new("CMYK", (16, 16), (255 - y, 255 - cb, 255 - cr, 0)), "JPEG", quality=95))
    segment = data.index(b"Adobe")
    assert data[segment + 11] == 0
    data[segment + 11] = 2
    for pixel in pixels_of(bytes(data)):
        assert_close(pixel, RED, 4)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}])
def test_jpeg_kinds(options: dict[str, object]) -> None:
    for pixel in pixels_of(encoded(Image.new("RGB", (17, 9), (200, 30, 90)), "JPEG", quality=95, **options)):
        assert_close(pixel, (200, 30, 90), 3)
    for pixel in pixels_of(encoded(Image.new("L", (17, 9), 140), "JPEG", quality=95, **options)):
        assert_close(pixel, (140, 140, 140), 1)


def test_colour_profiles_are_ignored() -> None:
    image = noise(30, 20)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    with_profile = encoded(image, "PNG", icc_profile=profile)
    assert b"iCCP" in with_profile
    assert pixels_of(with_profile) == pixels_of(encoded(image, "PNG"))


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(file_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], duration=100, **options)
    assert pixels_of(data) == [RED] * 64


def test_gif_with_transparency_and_a_frame_smaller_than_its_screen() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    assert pixels_of(encoded(image, "GIF", transparency=0)) == [WHITE, GREEN]


def test_webp_lossy_lossless_and_alpha() -> None:
    image = noise(20, 10)
    assert pixels_of(encoded(image, "WEBP", lossless=True)) == [tuple(p) for p in np.asarray(image).reshape(-1, 3)]
    for pixel in pixels_of(encoded(Image.new("RGB", (20, 10), (10, 200, 90)), "WEBP", quality=95)):
        assert_close(pixel, (10, 200, 90), 4)
    clear = encoded(Image.new("RGBA", (2, 2), (0, 0, 255, 51)), "WEBP", lossless=True)
    assert pixels_of(clear) == [blended(BLUE, 51)] * 4


# --- orientation ---

TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "JPEG"])
def test_orientation(file_format: str, orientation: int) -> None:
    stored = Image.new("RGB", (48, 32), BLUE)
    stored.paste(RED, (0, 0, 24, 16))
    stored.paste(GREEN, (24, 0, 48, 16))
    options = {"lossless": True} if file_format == "WEBP" else {"quality": 95, "subsampling": 0}
    data = encoded(stored, file_format, exif=exif_of(orientation), **options)
    upright = np.asarray(decode_rgb(data, max_pixels=LIMIT)).astype(int)
    expected = TURNS[orientation](np.asarray(stored)).astype(int)
    assert upright.shape == expected.shape
    assert np.abs(upright - expected).max() <= (30 if file_format == "JPEG" else 0)


AS_TEXT = b"Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHI4s", 0x0112, 2, 2, b"6\0") + b"\0\0\0\0"


@pytest.mark.parametrize(
    "exif", [exif_of(99), exif_of(0), AS_TEXT, AS_TEXT[:16], b"Exif\0\0II*\0garbage", b"Exif\0\0??"]
)
def test_odd_orientations_are_upright(exif: Image.Exif | bytes) -> None:
    image = noise(6, 4)
    data = encoded(image, "WEBP", exif=exif, lossless=True)
    assert pixels_of(data) == [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def test_an_orientation_before_corrupt_metadata_counts() -> None:
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0\2\0" + entry + b"cut"  # the second entry is missing: Pillow warns
    for file_format in ("JPEG", "WEBP"):
        assert decode_rgb(encoded(noise(6, 4), file_format, exif=exif), max_pixels=LIMIT).size == (4, 6)


# --- what is refused ---


def test_empty_file() -> None:
    assert refusal(b"").code == "empty_image_file"


@pytest.mark.parametrize(
    "data",
    [
        b"<html><body>404</body></html>",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        b"\0\0\x01\0\x01\0",
        b"8BPS\0\1",
        b"SIMPLE  =                    T",
        b"\xff\xd8",
        b"RIFF\0\0\0\0WAVE",
        b"\0",
        encoded(noise(4, 4), "BMP"),
        encoded(noise(4, 4), "TIFF"),
        encoded(noise(4, 4), "PPM"),
    ],
)
def test_other_formats(data: bytes) -> None:
    assert refusal(data).code == "invalid_image_format"


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("kept", [0.999, 0.5, 0.05])
def test_truncated_files(file_format: str, kept: float) -> None:
    data = encoded(noise(64, 64), file_format)
    length = int(len(data) * kept)
    if (file_format, kept) in (("GIF", 0.999), ("PNG", 0.999)):
        length = len(data) - 40  # beyond the trailer, into the pixels
    assert refusal(data[:length]).code == "image_parse_error"


def test_corrupt_files() -> None:
    png = bytearray(encoded(noise(64, 64), "PNG"))
    header_crc = bytearray(png)
    header_crc[29] ^= 1
    assert refusal(bytes(header_crc)).code == "image_parse_error"
    png[len(png) // 2] ^= 0xFF
    assert refusal(bytes(png)).code == "image_parse_error"
    assert refusal(b"\xff\xd8\xff" + b"\0" * 100).code == "image_parse_error"
    assert refusal(b"GIF89a").code == "image_parse_error"
    assert refusal(raw_png((0, 5), depth=8, colour=2, rows=[])).code == "image_parse_error"
    bomb = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"a" * 50_000_000))
    assert refusal(raw_png((1, 1), depth=8, colour=0, rows=[b"\0"], before=bomb)).code == "image_parse_error"


def jpeg_with_size(width: int, height: int) -> bytes:
    data = bytearray(encoded(noise(16, 16), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_with_canvas(width: int, height: int) -> bytes:
    body = encoded(noise(16, 16), "WEBP")[12:]
    canvas = bytes([0, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunks = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + body
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (raw_png((50_000, 50_000), depth=8, colour=2, rows=[b"\0" * 1000]), "50000 x 50000"),
        (b"GIF89a" + struct.pack("<HH", 60_000, 60_000) + b"\0\0\0,\0\0\0\0\1\0\1\0\0\2\2D\1\0;", "60000 x 60000"),
        (jpeg_with_size(65_000, 65_000), "65000 x 65000"),
        (jpeg_with_size(8_000, 8_000), "8000 x 8000"),
        (raw_png((MAX_SIDE + 1, 1), depth=8, colour=0, rows=[b"\0" * (MAX_SIDE + 1)]), f"{MAX_SIDE + 1} x 1"),
        (raw_png((1, MAX_SIDE + 1), depth=8, colour=0, rows=[b"\0"] * (MAX_SIDE + 1)), f"1 x {MAX_SIDE + 1}"),
    ],
)
def test_sizes_are_refused_before_pixels_are_decoded(data: bytes, size: str) -> None:
    start = time.perf_counter()
    error = refusal(data)
    assert time.perf_counter() - start < 1
    assert error.code == "image_too_large"
    assert size in error.message
    assert str(LIMIT) in error.message or str(MAX_SIDE) in error.message


def test_the_pixel_limit_is_exact() -> None:
    data = encoded(noise(101, 100), "GIF")
    assert decode_rgb(data, max_pixels=10_100).size == (101, 100)
    error = refusal(data, max_pixels=10_099)
    assert error.code == "image_too_large"
    assert "101 x 100, 10100 pixels" in error.message
    assert "10099" in error.message


def test_the_longest_side_is_allowed() -> None:
    data = raw_png((MAX_SIDE, 1), depth=8, colour=0, rows=[b"\x05" * MAX_SIDE])
    assert decode_rgb(data, max_pixels=LIMIT).size == (MAX_SIDE, 1)


def test_webp_canvas_beyond_all_bounds() -> None:
    start = time.perf_counter()
    assert refusal(webp_with_canvas(16_384, 16_000)).code == "image_too_large"
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_mutated_files_give_a_picture_or_a_typed_error(file_format: str) -> None:
    rng = random.Random(file_format)
    original = encoded(noise(24, 24), file_format)
    outcomes = set()
    for _ in range(300):
        data = bytearray(original)
        for _ in range(rng.choice((1, 1, 4, 16))):
            data[rng.randrange(8, len(data))] = rng.randrange(256)
        try:
            image = decode_rgb(bytes(data), max_pixels=100_000)
            outcomes.add(image.mode)
        except ClientError as error:
            outcomes.add(error.code)
    assert outcomes <= {"RGB", "image_parse_error", "image_too_large", "invalid_image_format"}
    assert len(outcomes) > 1
