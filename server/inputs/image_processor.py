"""From a decoded picture to the tiles the vision tower reads: cut, resize, name. Pure functions of pixels.

Knows nothing about file formats, tokens or tensors. The arithmetic is the checkpoint's own preprocessing, to the
bit: sides are truncated where it truncates, and pixels come from Pillow's antialiased bilinear filter, the one the
weights were trained with.
"""

from __future__ import annotations

import hashlib

from PIL import Image

from server.types import ImageSettings, Tile

# Frames the hash: raise it whenever the same picture would give other pixels, so that no stale embedding is reused.
_KEY_VERSION = b"idefics2-tile/1"


def tile_count(*, split: bool) -> int:
    """How many pictures `cut_and_resize` returns, whatever it is given."""
    return 5 if split else 1


def resized_size(width: int, height: int, settings: ImageSettings) -> tuple[int, int]:
    """The (width, height) of a tile made from a picture of `width` × `height` pixels, both at least 1.

    A longer side beyond `longest_edge` is brought down to it and the other follows, truncated; then each side is
    raised to `shortest_edge`, which may change the shape: 1 × 10000 becomes 378 × 980.
    """
    longest = settings.longest_edge
    if max(width, height) > longest:
        # Through the ratio, not `height * longest / width`: the two differ in the last bit, and so by a pixel.
        ratio = width / height
        if width >= height:
            width, height = longest, int(longest / ratio)
        else:
            width, height = int(longest * ratio), longest
    return max(width, settings.shortest_edge), max(height, settings.shortest_edge)


def cut_and_resize(image_rgb: Image.Image, *, split: bool, settings: ImageSettings) -> list[Image.Image]:
    """The whole picture or, if `split`, five: top-left, top-right, bottom-left, bottom-right, the whole.

    The original is cut at half its sides, rounded down, and each piece is resized by itself. A picture one pixel
    wide or high has empty quarters; the whole picture stands in for each of them, so that a split picture is five
    tiles whatever its size.
    """
    if image_rgb.mode != "RGB":
        raise ValueError(f"tiles are made from an RGB image, not from mode {image_rgb.mode}")
    pieces = [*_quarters(image_rgb), image_rgb] if split else [image_rgb]
    return [piece.resize(resized_size(*piece.size, settings), Image.Resampling.BILINEAR) for piece in pieces]


def _quarters(image: Image.Image) -> list[Image.Image]:
    width, height = image.size
    middle_x, middle_y = width // 2, height // 2
    quarters = []
    for top, bottom in ((0, middle_y), (middle_y, height)):
        for left, right in ((0, middle_x), (middle_x, width)):
            empty = left == right or top == bottom
            # Cut first and resize after: resizing with a box would let the filter see pixels across the cut.
            quarters.append(image if empty else image.crop((left, top, right, bottom)))
    return quarters


def named_tile(height: int, width: int, pixels: bytes) -> Tile:
    """A tile under a key of 32 bytes, which takes a millisecond or two.

    The size is part of the key: 30 × 100 and 100 × 30 tiles may hold the same pixels in the same order.
    """
    digest = hashlib.sha256(_KEY_VERSION)
    digest.update(height.to_bytes(4, "big"))
    digest.update(width.to_bytes(4, "big"))
    digest.update(pixels)
    return Tile(key=digest.digest(), height=height, width=width, pixels=pixels)
