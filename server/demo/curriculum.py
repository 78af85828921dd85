"""Which pictures are drawn at which point of the training, and batches of them, from a seed."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from server.demo.examples import IGNORED, Example, ExampleMaker
from server.demo.scenes.catalog import paint
from server.demo.scenes.studio import Studio

LONGEST, SHORTEST = 224, 84  # of a tile, in pixels


Learners = Literal["eyes", "reader", "all"]


@dataclass(frozen=True)
class Stage:
    """`share` of each kind of scene; of `split` pictures; sides in pixels of tiles; letters not below `min_letters`.

    `learners`: "eyes" are the tower and the connector, which learn by the letters in their patches and cells, and
    nothing is asked; "reader" is the language model, which learns to read what they give. Thrown together from the
    start, answers that are mere guesses spoil the letters.
    """

    steps: int
    shares: Mapping[str, float]
    split: float
    sides: tuple[int, int]
    min_letters: int
    learners: Learners = "all"


LETTERS = Stage(
    steps=1_000,
    shares={"number": 1, "word": 1, "lines": 3, "table": 1, "receipt": 1, "page": 2, "figures": 0.5},
    split=0.0,
    sides=(84, 140),
    min_letters=12,
    learners="eyes",
)
READING = Stage(
    steps=1_000,
    shares={"number": 2, "word": 2, "lines": 3, "page": 1.5, "table": 1, "receipt": 1},
    split=0.0,
    sides=(84, 154),
    min_letters=12,
    learners="reader",
)
ALL = Stage(
    steps=1 << 30,
    shares={
        "number": 1.2,
        "word": 1.5,
        "lines": 2.5,
        "figures": 2,
        "table": 2,
        "receipt": 2,
        "page": 2,
        "compare": 1,
        "nothing": 0.3,
    },
    split=0.25,
    sides=(84, 224),
    min_letters=11,
)
STAGES = (LETTERS, READING, ALL)


@dataclass(frozen=True)
class TileGroup:
    """Tiles of one size.

    tiles: uint8 [N, height, width, 3]; glyphs: int64 [N, patches, 2]; cells: int64 [N, rows, 6]
    positions: int64 [N * rows], where the rows of the tiles go among the B * L ids of their batch
    """

    tiles: npt.NDArray[np.uint8]
    glyphs: npt.NDArray[np.int64]
    cells: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Conversations about pictures of one size, whose tiles have two sizes at most.

    token_ids, labels: int64 [B, L], padded with 0 and IGNORED
    """

    groups: list[TileGroup]
    token_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    learners: Learners


def stage_at(step: int) -> Stage:
    for stage in STAGES:
        if step < stage.steps:
            return stage
        step -= stage.steps
    return STAGES[-1]


def draw_batch(
    step: int,
    part: int,
    *,
    seed: int,
    pictures: int,
    maker: ExampleMaker,
    typefaces: Sequence[str],
    image_token_id: int,
) -> Batch:
    """The batch of a step; the same for the same arguments. `pictures` is its size in tiles of 112 × 112 pixels."""
    chance = random.Random(f"{seed}/{step}/{part}")
    stage = stage_at(step)
    split = chance.random() < stage.split
    width, height = _sides(chance, stage)
    cost = 0.35 + 0.65 * width * height / 112**2
    if split:
        width, height = 2 * width, 2 * height
        cost *= 5
    if stage.learners == "eyes":
        cost /= 2
    count = max(4, round(pictures / cost))
    kinds, shares = list(stage.shares), list(stage.shares.values())
    examples: list[Example] = []
    while len(examples) < count:
        kind = chance.choices(kinds, shares)[0]
        if split and kind == "compare":
            continue
        scale = chance.choice((1, 1, 1.5)) if not split and max(width, height) == LONGEST else 1
        studio = Studio(
            chance,
            typefaces,
            width=int(width * scale),
            height=int(height * scale),
            min_letters=round(stage.min_letters * scale),
            max_letters=round(chance.choice((24, 40, 64)) * scale),
        )
        examples.append(maker.make(paint(kind, studio), split=split))
    return _collate(examples, image_token_id, stage.learners)


def _sides(chance: random.Random, stage: Stage) -> tuple[int, int]:
    low, high = stage.sides
    width, height = chance.randint(low, high), chance.randint(low, high)
    if high == LONGEST and chance.random() < 0.25:
        return (LONGEST, height) if chance.random() < 0.5 else (width, LONGEST)
    return width, height


def _collate(examples: Sequence[Example], image_token_id: int, learners: Learners) -> Batch:
    length = max(len(example.token_ids) for example in examples)
    token_ids = np.zeros((len(examples), length), dtype=np.int64)
    labels = np.full((len(examples), length), IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        token_ids[row, : len(example.token_ids)] = example.token_ids
        labels[row, : len(example.labels)] = example.labels
    places = np.flatnonzero(token_ids.ravel() == image_token_id)
    tiles = [tile for example in examples for tile in example.tiles]
    glyphs = [labels for example in examples for labels in example.glyphs]
    cells = [labels for example in examples for labels in example.cells]
    rows = places.reshape(len(tiles), -1)
    groups = []
    for size in dict.fromkeys(tile.shape for tile in tiles):
        members = [index for index, tile in enumerate(tiles) if tile.shape == size]
        groups.append(
            TileGroup(
                tiles=np.stack([tiles[index] for index in members]),
                glyphs=np.stack([glyphs[index] for index in members]),
                cells=np.stack([cells[index] for index in members]),
                positions=rows[members].ravel(),
            )
        )
    return Batch(groups, token_ids, labels, learners)
