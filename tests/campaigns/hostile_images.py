"""Image files that nobody should send: real ones of all kinds, mutated with knowledge of their structure, and bombs.

Everything follows from a seed and a number, so that a file that shows something can be made again.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from functools import cache

from PIL import Image, ImageCms

from tests.inputs.pictures import encoded, noise, png_chunk, raw_png

Mutation = Callable[[random.Random, bytes], bytes]

# What sizes and lengths are changed to: nothing, one, and the edges of what is served and of what a field can hold.
_SIZES = (0, 1, 2, 3, 100, 1000, 4000, 16383, 16384, 16385, 50_000, 65_535, 2**24 - 1, 2**31 - 1, 2**32 - 1)
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@cache
def whole_files() -> tuple[bytes, ...]:
    """Files that can be decoded, of every kind that the four formats have."""
    rgb = noise(40, 31)
    modes = {mode: rgb.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")}
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    frames = [noise(24, 24, seed) for seed in range(4)]
    animation = {"save_all": True, "append_images": frames[1:], "duration": 40, "loop": 0}
    wide_row = struct.pack(">12H", *range(0, 65_536, 5500))
    return (
        encoded(rgb, "JPEG"),
        encoded(rgb, "JPEG", progressive=True, quality=90),
        encoded(rgb, "JPEG", subsampling=2, optimize=True),
        encoded(rgb, "JPEG", subsampling=0, exif=exif, icc_profile=profile, comment=b"comment"),
        encoded(rgb, "JPEG", restart_marker_blocks=2),
        encoded(modes["L"], "JPEG"),
        encoded(modes["CMYK"], "JPEG"),
        *(encoded(modes[mode], "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        encoded(Image.new("I;16", (17, 9), 40_000), "PNG"),
        encoded(rgb, "PNG", exif=exif, icc_profile=profile, transparency=(1, 2, 3)),
        encoded(frames[0], "PNG", **animation),
        raw_png((4, 3), depth=16, colour=2, rows=[wide_row] * 3),
        raw_png((2, 2), depth=8, colour=2, rows=[bytes(3), bytes(3), bytes(6)], interlaced=True),
        raw_png((2, 1), depth=2, colour=0, rows=[b"\x60"], before=png_chunk(b"tRNS", b"\0\2")),
        encoded(rgb, "WEBP"),
        encoded(rgb, "WEBP", lossless=True),
        encoded(modes["RGBA"], "WEBP", exif=exif, icc_profile=profile),
        encoded(frames[0], "WEBP", **animation),
        encoded(modes["P"], "GIF"),
        encoded(modes["L"], "GIF", interlace=0),
        encoded(modes["P"], "GIF", transparency=3),
        encoded(frames[0], "GIF", **animation),
    )


@cache
def bombs() -> tuple[bytes, ...]:
    """Small files that ask for much, and files of two kinds at once."""
    jpeg, png, webp, gif = encoded(noise(16, 16), "JPEG"), encoded(noise(16, 16), "PNG"), *_small_webp_and_gif()
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(64)) + packer.flush()
    after_header = len(_PNG_SIGNATURE) + 25
    chunks = ((b"zTXt", b"Comment\0\0"), (b"iTXt", b"Comment\0\1\0\0\0"), (b"iCCP", b"sRGB\0\0"), (b"eXIf", b""))
    text_bombs = [png[:after_header] + png_chunk(name, head + packed) + png[after_header:] for name, head in chunks]
    many_texts = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(60_000))) * 500
    frame = gif[gif.index(b",") : -1]
    return (
        *text_bombs,
        png[:after_header] + many_texts + png[after_header:],
        *(_png_of(size) for size in ((50_000, 50_000), (2**31 - 1, 2**31 - 1), (6000, 6000), (16_384, 2), (0, 0))),
        _set_jpeg_size(jpeg, 6000, 6000),
        _set_jpeg_size(jpeg, 65_535, 65_535),
        _many_scans(),
        gif[:-1] + frame * 5000 + b";",
        gif[:6] + struct.pack("<HH", 60_000, 60_000) + gif[10:],
        *(_jpeg_with_exif(exif) for exif in _looping_exif()),
        jpeg + png,
        png + jpeg,
        b"GIF89a/*" + b"<script>*/=1;</script>" + png,
        gif + b"PK\x03\x04" + bytes(200) + b"PK\x05\x06" + bytes(18),
        jpeg[:2] + b"\xff\xfe" + struct.pack(">H", len(png) + 2) + png + jpeg[2:],
        b"RIFF" + struct.pack("<I", 2**32 - 1) + webp[8:],
        webp[:12] + b"VP8X" + struct.pack("<I", 10) + bytes([2, 0, 0, 0]) + b"\xff" * 6 + webp[12:],
    )


def hostile_file(seed: int, number: int) -> bytes:
    """The `number`-th file of a campaign."""
    rng = random.Random(f"{seed}/{number}")
    if rng.random() < 0.02:
        data = rng.choice(bombs())
        return data if rng.random() < 0.5 else _flip_bits(rng, data)
    data = rng.choice(whole_files())
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(MUTATIONS)(rng, data)
    return data


# --- mutations -----------------------------------------------------------------------------------------------------


def _flip_bits(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _set_bytes(rng: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8))):
        if changed:
            changed[rng.randrange(len(changed))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(changed)


def _truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _move_slice(rng: random.Random, data: bytes) -> bytes:
    """Cut a slice out, double it, or put it elsewhere."""
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    where = rng.randrange(len(data) + 1)
    taken = data[start:end]
    rest = data[:start] + data[end:]
    return rng.choice((rest, data[:end] + taken + data[end:], rest[:where] + taken + rest[where:]))


def _insert_noise(rng: random.Random, data: bytes) -> bytes:
    where = rng.randrange(len(data) + 1)
    return data[:where] + rng.randbytes(rng.choice((1, 4, 100))) + data[where:]


def _splice(rng: random.Random, data: bytes) -> bytes:
    """The start of this file and the end of another."""
    other = rng.choice(whole_files())
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]


def _set_length(rng: random.Random, data: bytes) -> bytes:
    """Some field of 1 to 4 bytes becomes one of the sizes that mean trouble; in a PNG, with the right checksum."""
    width = rng.choice((1, 2, 2, 3, 4))
    value = rng.choice(_SIZES) & ((1 << (8 * width)) - 1)
    where = rng.randrange(max(1, len(data) - width))
    changed = data[:where] + value.to_bytes(width, rng.choice(("big", "little"))) + data[where + width :]
    return _with_checksums(changed)


def _set_size(rng: random.Random, data: bytes) -> bytes:
    """Another width and height where the file's kind has them."""
    width, height = rng.choice(_SIZES), rng.choice(_SIZES)
    if data.startswith(_PNG_SIGNATURE) and len(data) > 24:
        return _with_checksums(data[:16] + struct.pack(">II", width, height) + data[24:])
    if data.startswith(b"\xff\xd8"):
        return _set_jpeg_size(data, width & 0xFFFF, height & 0xFFFF)
    if data.startswith(b"GIF") and len(data) > 10:
        return data[:6] + struct.pack("<HH", width & 0xFFFF, height & 0xFFFF) + data[10:]
    if data[8:12] == b"WEBP" and len(data) > 30:
        where = 24 if data[12:16] == b"VP8X" else 26
        return data[:where] + struct.pack("<II", width, height)[1:7] + data[where + 6 :]
    return data


def _shuffle_chunks(rng: random.Random, data: bytes) -> bytes:
    """Parts of the file in another order, twice, or not at all; their checksums and lengths stay right."""
    head, chunks = _chunks(data)
    if not chunks:
        return data
    for _ in range(rng.choice((1, 1, 3))):
        first, second = rng.randrange(len(chunks)), rng.randrange(len(chunks))
        what = rng.randrange(3)
        if what == 0:
            chunks[first], chunks[second] = chunks[second], chunks[first]
        elif what == 1:
            chunks.insert(second, chunks[first])
        elif len(chunks) > 1:
            del chunks[first]
    return head + b"".join(chunks)


def _change_within_chunk(rng: random.Random, data: bytes) -> bytes:
    """Past a PNG's checksums, which stop most other changes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8))):
        if changed:
            changed[rng.randrange(min(8, len(changed) - 1), len(changed))] = rng.randrange(256)
    return _with_checksums(bytes(changed))


def _change_pixels(rng: random.Random, data: bytes) -> bytes:
    """A PNG whose compressed rows are another stream: shorter, longer, of other filters, or bad in the middle."""
    head, chunks = _chunks(data)
    if not data.startswith(_PNG_SIGNATURE):
        return _flip_bits(rng, data)
    body = b"".join(chunk[8:-4] for chunk in chunks if chunk[4:8] == b"IDAT")
    try:
        rows = bytearray(zlib.decompressobj().decompress(body, 1 << 20))
    except zlib.error:
        return data
    for _ in range(rng.choice((1, 4, 16))):
        if rows:
            rows[rng.randrange(len(rows))] = rng.choice((0, 1, 2, 3, 4, 5, 255))
    rows = rows[: rng.randrange(len(rows) + 1)] if rng.random() < 0.3 else rows + bytes(rng.choice((0, 0, 1, 5000)))
    packed = png_chunk(b"IDAT", zlib.compress(bytes(rows), rng.choice((0, 1, 9))))
    kept = [chunk for chunk in chunks if chunk[4:8] != b"IDAT"]
    return head + b"".join(kept[:-1]) + packed + b"".join(kept[-1:])


MUTATIONS: tuple[Mutation, ...] = (
    *(_flip_bits, _set_bytes, _truncate, _move_slice, _insert_noise, _splice, _set_length, _set_size),
    *(_shuffle_chunks, _change_within_chunk, _change_pixels),
)


# --- formats -------------------------------------------------------------------------------------------------------


def _chunks(data: bytes) -> tuple[bytes, list[bytes]]:
    """A file's head and its parts: PNG and RIFF chunks, JPEG segments; empty where they cannot be told apart."""
    parts: list[bytes] = []
    if data.startswith(_PNG_SIGNATURE):
        start, head = 8, data[:8]
        while start + 12 <= len(data):
            end = start + 12 + int.from_bytes(data[start : start + 4], "big")
            parts.append(data[start:end])
            start = end
    elif data.startswith(b"\xff\xd8"):
        start, head = 2, data[:2]
        while data[start : start + 1] == b"\xff" and data[start + 1 : start + 2] != b"\xda":
            end = start + 2 + max(2, int.from_bytes(data[start + 2 : start + 4], "big"))
            parts.append(data[start:end])
            start = end
        parts.append(data[start:])
    elif data[8:12] == b"WEBP":
        start, head = 12, data[:12]
        while start + 8 <= len(data):
            size = int.from_bytes(data[start + 4 : start + 8], "little")
            parts.append(data[start : start + 8 + size + size % 2])
            start += 8 + size + size % 2
    else:
        head = data
    return head, parts


def _with_checksums(data: bytes) -> bytes:
    if not data.startswith(_PNG_SIGNATURE):
        return data
    head, chunks = _chunks(data)
    return head + b"".join(
        chunk[:-4] + struct.pack(">I", zlib.crc32(chunk[4:-4])) if len(chunk) >= 12 else chunk for chunk in chunks
    )


def _png_of(size: tuple[int, int]) -> bytes:
    """A PNG that says it is so large and has one row of it."""
    return raw_png(size, depth=8, colour=2, rows=[bytes(min(size[0] * 3, 4096))])


def _set_jpeg_size(data: bytes, width: int, height: int) -> bytes:
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    if frame < 0:
        return data
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def _many_scans() -> bytes:
    """A progressive JPEG of 16 megapixels which is refined again and again: time, not memory."""
    data = _set_jpeg_size(encoded(noise(16, 16), "JPEG", progressive=True), 4000, 4000)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 400 + data[-2:]


def _small_webp_and_gif() -> tuple[bytes, bytes]:
    return encoded(noise(16, 16), "WEBP"), encoded(noise(16, 16).convert("P"), "GIF")


def _looping_exif() -> list[bytes]:
    """Directories that lead back to themselves, to beyond the end, or to values of four gigabytes."""

    def directory(*entries: tuple[int, int, int, int], follows: int = 0) -> bytes:
        body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
        return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + struct.pack("<I", follows)

    return [
        directory((0x8769, 4, 1, 8), follows=8),  # the EXIF directory is the first one
        directory((0x8825, 4, 1, 8), (0xA005, 4, 1, 8), (0x8769, 4, 1, 8)),
        directory((0x0112, 3, 2**32 - 1, 8)),
        directory((0x0112, 2, 2**31, 2**31)),
        directory((0x0112, 12, 1, 2**32 - 4)),
        directory(*[(0x8769, 4, 1, 8)] * 2000, follows=8),
        b"II*\0" + struct.pack("<I", 2**32 - 1),
    ]


def _jpeg_with_exif(exif: bytes) -> bytes:
    data = encoded(noise(16, 16), "JPEG")
    body = b"Exif\0\0" + exif
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]
