"""Pictures of odd shapes: each is a whole number of tiles that the model can read, or is refused for its size.

What a prompt holds for a picture and what the vision tower gives for it are counted apart; they must agree always, or
rows of one picture would stand where another's belong.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from server.errors import ClientError
from server.inputs.image_decode import MAX_SIDE, decode_rgb
from server.inputs.image_processor import cut_and_resize, tile_count
from server.inputs.placeholders import PromptIds
from server.model.attention.sdpa import SdpaAttention
from server.model.config import load_model_config
from server.model.idefics2 import Idefics2Model
from server.model.loader import load_model
from server.types import ImageSettings
from tests.inputs.pictures import raw_png

SETTINGS = ImageSettings(do_image_splitting=True)
LIMIT = 40_000_000
SIDES = (1, 2, 3, 4, 13, 14, 15, 27, 28, 377, 378, 379, 380, 686, 812, 979, 980, 981, MAX_SIDE)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> Idefics2Model:
    config = load_model_config(tiny_checkpoint)
    attention = SdpaAttention(sliding_window=config.text.sliding_window)
    device = torch.device("cpu")
    return load_model(tiny_checkpoint, config, attention=attention, device=device, dtype=torch.float32)


def white_png(width: int, height: int) -> bytes:
    """Of one bit a pixel, so that 16 megapixels are two megabytes."""
    return raw_png((width, height), depth=1, colour=0, rows=[b"\xff" * ((width + 7) // 8)] * height)


class RowCounter:
    """How many embeddings the vision tower gives for a tile, which it is asked once for every width and every height.

    It reads sizes one at a time, and nothing in it knows of a pair of them.
    """

    def __init__(self, model: Idefics2Model) -> None:
        self._model = model
        self._rows = 0
        self.widths: set[int] = set()
        self.heights: set[int] = set()

    def count(self, tile: Image.Image) -> int:
        if tile.width not in self.widths or tile.height not in self.heights:
            self.widths.add(tile.width)
            self.heights.add(tile.height)
            pixels = torch.frombuffer(bytearray(tile.tobytes()), dtype=torch.uint8).view(1, tile.height, tile.width, 3)
            with torch.inference_mode():
                rows = self._model.encode_tiles(pixels)
            assert torch.isfinite(rows).all()
            assert rows.shape[1] == (self._rows or rows.shape[1])
            self._rows = rows.shape[1]
        return self._rows


def num_placeholders(num_tiles: int, rows_per_tile: int) -> int:
    """Image tokens that a prompt holds for a picture: ids of its own kind, and the ranges that say where they are."""
    prompt = PromptIds(fake_token_id=1, image_token_id=2, rows_per_tile=rows_per_tile)
    prompt.add_tiles(num_tiles)
    assert prompt.token_ids.count(2) == sum(place.length for place in prompt.placeholders)
    return prompt.token_ids.count(2)


def test_every_odd_shape_is_as_many_rows_as_the_prompt_has_room_for(model: Idefics2Model) -> None:
    rows = RowCounter(model)
    num_refused = 0
    for width, height in itertools.product(SIDES, repeat=2):
        file = white_png(width, height)
        if width * height > LIMIT:
            with pytest.raises(ClientError) as caught:
                decode_rgb(file, max_pixels=LIMIT)
            assert (caught.value.status, caught.value.code) == (400, "image_too_large")
            num_refused += 1
            continue
        image = decode_rgb(file, max_pixels=LIMIT)
        assert (image.mode, image.size) == ("RGB", (width, height))
        for split in (False, True):
            tiles = cut_and_resize(image, split=split, settings=SETTINGS)
            assert len(tiles) == tile_count(split=split)
            for tile in tiles:
                assert 378 <= min(tile.size) <= max(tile.size) <= 980
                assert tile.getpixel((0, 0)) == tile.getpixel((tile.width - 1, tile.height - 1)) == (255, 255, 255)
            assert num_placeholders(len(tiles), 64) == sum(rows.count(tile) for tile in tiles)
    assert num_refused == 1
    assert len(rows.widths) == len(rows.heights) == 14


def test_random_shapes_are_tiles_of_the_sizes_that_the_model_reads() -> None:
    rng = random.Random(0)
    for _ in range(150):
        width, height = rng.randint(1, 1200), rng.choice((rng.randint(1, 40), rng.randint(1, 1200)))
        image = decode_rgb(white_png(width, height), max_pixels=LIMIT)
        for split in (False, True):
            tiles = cut_and_resize(image, split=split, settings=SETTINGS)
            assert len(tiles) == tile_count(split=split)
            assert all(378 <= min(tile.size) <= max(tile.size) <= 980 for tile in tiles)
