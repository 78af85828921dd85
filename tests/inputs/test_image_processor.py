from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.image_utils import SizeDict
from transformers.models.idefics2.image_processing_pil_idefics2 import (
    Idefics2ImageProcessorPil,
    get_resize_output_image_size,
)

from server.inputs.image_processor import resized_size, tile_count
from server.types import ImageSettings, Tile
from tests.inputs.pictures import make_tiles, noise

SETTINGS = ImageSettings(do_image_splitting=True)
REFERENCE = Idefics2ImageProcessorPil()
EDGES = [1, 2, 3, 4, 13, 14, 15, 27, 28, 377, 378, 379, 380, 447, 448, 686, 812, 979, 980, 981, 1960, 16384]


def reference_size(width: int, height: int) -> tuple[int, int]:
    picture = np.broadcast_to(np.uint8(0), (3, height, width))  # only its shape is read
    tall, wide = get_resize_output_image_size(picture, SizeDict(shortest_edge=378, longest_edge=980))
    return wide, tall


def reference_tiles(image: Image.Image, *, split: bool) -> list[np.ndarray]:
    """Height × width × 3 arrays from the reference processor."""
    batch = REFERENCE(
        [[image]], do_image_splitting=split, do_rescale=False, do_normalize=False, do_pad=False, return_tensors=None
    )
    return [np.asarray(tile).transpose(1, 2, 0) for tile in batch["pixel_values"][0]]


def as_array(tile: Tile) -> np.ndarray:
    return np.frombuffer(tile.pixels, np.uint8).reshape(tile.height, tile.width, 3)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((980, 980), (980, 980)),
        ((1, 1), (378, 378)),
        ((1, 10000), (378, 980)),
        ((10000, 1), (980, 378)),
        ((1008, 900), (980, 874)),  # exactly 875, but the reference goes through a rounded ratio and truncates
        ((1960, 1000), (980, 500)),
        ((640, 480), (640, 480)),
        ((100, 900), (378, 900)),
    ],
)
def test_known_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(*size, SETTINGS) == expected


def test_sizes_equal_the_reference() -> None:
    rng = random.Random(1)
    sizes = [(width, height) for width in EDGES for height in EDGES]
    sizes += [(rng.randint(1, 5000), rng.randint(1, 5000)) for _ in range(20_000)]
    wrong = [size for size in sizes if resized_size(*size, SETTINGS) != reference_size(*size)]
    assert wrong == []


@given(st.integers(1, 16384), st.integers(1, 16384), st.integers(1, 400), st.integers(400, 1200))
def test_sides_stay_within_the_edges(width: int, height: int, shortest: int, longest: int) -> None:
    settings = ImageSettings(shortest_edge=shortest, longest_edge=longest, do_image_splitting=False)
    for side in resized_size(width, height, settings):
        assert shortest <= side <= longest


@pytest.mark.parametrize("split", [False, True])
def test_pixels_equal_the_reference(split: bool) -> None:
    rng = random.Random(int(split))
    sizes = [(2, 2), (3, 1000), (379, 377), (447, 448), (980, 980), (981, 979), (1961, 40)]
    sizes += [(rng.randint(2, 1500), rng.randint(2, 1500)) for _ in range(12)]
    for seed, (width, height) in enumerate(sizes):
        image = noise(width, height, seed)
        ours = make_tiles(image, split=split, settings=SETTINGS)
        theirs = reference_tiles(image, split=split)
        assert len(ours) == len(theirs) == tile_count(split=split)
        for our, their in zip(ours, theirs, strict=True):
            assert np.array_equal(as_array(our), their), (width, height)


def test_order_of_the_crops() -> None:
    image = Image.new("RGB", (800, 900))
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]
    for colour, corner in zip(colours, [(0, 0), (400, 0), (0, 450), (400, 450)], strict=True):
        image.paste(colour, (*corner, corner[0] + 400, corner[1] + 450))
    *crops, whole = make_tiles(image, split=True, settings=SETTINGS)
    for crop, colour in zip(crops, colours, strict=True):
        assert (crop.width, crop.height) == (400, 450)
        assert np.unique(as_array(crop).reshape(-1, 3), axis=0).tolist() == [list(colour)]
    assert (whole.width, whole.height) == (800, 900)
    assert whole == make_tiles(image, split=False, settings=SETTINGS)[0]


@pytest.mark.parametrize(("size", "empty"), [((1, 10), [0, 2]), ((10, 1), [0, 1]), ((1, 1), [0, 1, 2])])
def test_one_pixel_sides_still_give_five_tiles(size: tuple[int, int], empty: list[int]) -> None:
    image = noise(*size)
    tiles = make_tiles(image, split=True, settings=SETTINGS)
    assert len(tiles) == 5
    for index in empty:
        assert tiles[index] == tiles[4]
    bottom_right = image.crop((size[0] // 2, size[1] // 2, *size))
    assert tiles[3] == make_tiles(bottom_right, split=False, settings=SETTINGS)[0]


def test_keys_name_size_and_pixels() -> None:
    wide, tall = (
        make_tiles(Image.new("RGB", size, (7, 7, 7)), split=False, settings=SETTINGS)[0]
        for size in ((500, 400), (400, 500))
    )
    assert wide.pixels == tall.pixels  # the trap: equal bytes in another shape
    assert wide.key != tall.key
    assert len(wide.key) == 32
    again = make_tiles(Image.new("RGB", (500, 400), (7, 7, 7)), split=False, settings=SETTINGS)[0]
    assert again.key == wide.key
    changed = Image.new("RGB", (500, 400), (7, 7, 7))
    changed.putpixel((499, 399), (7, 7, 8))
    assert make_tiles(changed, split=False, settings=SETTINGS)[0].key != wide.key


def test_refuses_other_modes() -> None:
    with pytest.raises(ValueError, match="RGBA"):
        make_tiles(Image.new("RGBA", (400, 400)), split=False, settings=SETTINGS)
