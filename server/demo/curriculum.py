"""Which pictures are drawn at which point of the training, and batches of them, from a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from server.demo.examples import IGNORED, Example, ExampleMaker
from server.demo.scenes.catalog import paint
from server.demo.scenes.studio import Scene, Studio

LONGEST, SHORTEST = 224, 84  # of a tile, in pixels

Learners = Literal["eyes", "reader", "all"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`shares` of each kind of scene; of `split` pictures, which have `split_shares`, and of `pairs` of pictures; sides
    in pixels of tiles; letters not below `min_letters`.

    `pictures`: for how many it lasts, in tiles of 112 × 112 pixels.
    `learners`: "eyes" are the tower and the connector, which learn by the letters in their patches and cells, and
    nothing is asked; "reader" is the language model, which learns to read what they give. Thrown together from the
    start, answers that are mere guesses spoil the letters.
    """

    pictures: float
    shares: Mapping[str, float]
    sides: tuple[int, int]
    min_letters: int
    split: float = 0.0
    split_shares: Mapping[str, float] = field(default_factory=dict)
    pairs: float = 0.0
    learners: Learners = "all"


LETTERS = Stage(
    pictures=450_000,
    shares={"number": 1, "word": 1, "lines": 2.5, "table": 1, "receipt": 1, "page": 2.5, "figures": 1.5},
    sides=(84, 182),
    min_letters=12,
    learners="eyes",
)
READING = Stage(
    pictures=250_000,
    shares={"number": 1.5, "word": 1.5, "lines": 2.5, "page": 2, "table": 1.5, "receipt": 1, "figures": 2},
    sides=(84, 182),
    min_letters=12,
    learners="reader",
)
ALL = Stage(
    pictures=float("inf"),
    shares={
        "number": 1.2,
        "word": 1,
        "lines": 1.7,
        "figures": 3,
        "table": 3,
        "receipt": 2.3,
        "page": 2.5,
        "nothing": 0.3,
    },
    split=0.22,
    pairs=0.06,
    split_shares={"number": 0.5, "word": 0.5, "lines": 1, "figures": 1.5, "table": 2, "receipt": 1.5, "page": 6},
    sides=(84, 224),
    min_letters=11,
)
STAGES = (LETTERS, READING, ALL)


@dataclass(frozen=True)
class TileGroup:
    """Tiles of one size.

    tiles: uint8 [N, height, width, 3]
    patches: int16 [N, patches, 2], cells: int16 [N, rows, 8], words: int16 [N, rows, 2] and
    marks: int16 [N, rows, 1], see Example
    positions: int64 [N * rows], where the rows of the tiles go among the B * L ids of their batch
    """

    tiles: Tensor
    patches: Tensor
    cells: Tensor
    words: Tensor
    marks: Tensor
    positions: Tensor

    def to(self, device: torch.device) -> TileGroup:
        return TileGroup(**{name: _moved(tensor, device) for name, tensor in vars(self).items()})


@dataclass(frozen=True)
class Batch:
    """Conversations about pictures of one size, whose tiles have two sizes at most.

    token_ids: int64 [B, L], padded with 0
    asked: int64 [A], the places among the B * L ids whose next token belongs to an answer
    answers: int64 [A], those tokens
    """

    groups: list[TileGroup]
    token_ids: Tensor
    asked: Tensor
    answers: Tensor
    learners: Learners

    def to(self, device: torch.device) -> Batch:
        tensors = {name: _moved(getattr(self, name), device) for name in ("token_ids", "asked", "answers")}
        return Batch(groups=[group.to(device) for group in self.groups], learners=self.learners, **tensors)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it: a copy from memory that is not pinned would."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def stage_at(pictures: float) -> Stage:
    """The stage that one is in after so many pictures."""
    for stage in STAGES:
        if pictures < stage.pictures:
            return stage
        pictures -= stage.pictures
    return STAGES[-1]


def draw_batch(
    step: int,
    part: int,
    *,
    parts: int,
    seed: int,
    pictures: int,
    maker: ExampleMaker,
    typefaces: Sequence[str],
    image_token_id: int,
) -> Batch:
    """Part `part` of `parts` of a step; the same for the same arguments.

    `pictures` is the size of the whole step, in tiles of 112 × 112 pixels.
    """
    chance = random.Random(f"{seed}/{step}/{part}")
    stage = stage_at(step * pictures)
    pairs, split = chance.random() < stage.pairs, chance.random() < stage.split
    split = split and not pairs
    width, height = _sides(chance, stage)
    cost = 0.35 + 0.65 * width * height / 112**2
    if split:
        width, height = 2 * width, 2 * height
        cost *= 5
    if stage.learners == "eyes":
        cost /= 2
    if pairs:
        cost *= 2
    count = max(4, round(pictures / parts / cost))
    shares = {"compare": 1.0} if pairs else stage.split_shares if split else stage.shares
    examples: list[Example] = []
    while len(examples) < count:
        kind = chance.choices(list(shares), list(shares.values()))[0]
        scale = chance.choice((1, 1, 1.5)) if not split and max(width, height) == LONGEST else 1
        size = (int(width * scale), int(height * scale))
        scene = _draw(kind, chance, typefaces, size, min_letters=scale * stage.min_letters, scale=scale)
        examples.append(maker.make(scene, split=split))
    return _collate(examples, image_token_id, stage.learners)


def _draw(
    kind: str,
    chance: random.Random,
    typefaces: Sequence[str],
    size: tuple[int, int],
    *,
    min_letters: float,
    scale: float,
) -> Scene:
    """A scene of this size. Every third is stretched or narrowed, which makes new typefaces of the known ones."""
    across, down = (chance.uniform(0.82, 1.2), chance.uniform(0.82, 1.2)) if chance.random() < 0.35 else (1.0, 1.0)
    studio = Studio(
        chance,
        typefaces,
        width=round(size[0] * across),
        height=round(size[1] * down),
        min_letters=math.ceil(min_letters * max(across, down, 1.0)),
        max_letters=round(chance.choice((24, 40, 64)) * scale),
    )
    scene = paint(kind, studio)
    if (across, down) != (1.0, 1.0):
        scene.canvases = [canvas.resized(*size) for canvas in scene.canvases]
    return scene


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
    asked = np.flatnonzero(labels.ravel() != IGNORED)  # never a row's first, which is the beginning of the sequence
    tiles = [tile for example in examples for tile in example.tiles]
    labels_of = {
        name: [labels for example in examples for labels in getattr(example, name)]
        for name in ("patches", "cells", "words", "marks")
    }
    places = np.flatnonzero(token_ids.ravel() == image_token_id)
    rows = places.reshape(len(tiles), len(places) // max(len(tiles), 1))
    groups = []
    for size in dict.fromkeys(tile.shape for tile in tiles):
        members = [index for index, tile in enumerate(tiles) if tile.shape == size]
        groups.append(
            TileGroup(
                tiles=torch.from_numpy(np.stack([tiles[index] for index in members])),
                **{
                    name: torch.from_numpy(np.stack([labels[index] for index in members]).astype(np.int16))
                    for name, labels in labels_of.items()
                },
                positions=torch.from_numpy(rows[members].ravel()),
            )
        )
    return Batch(
        groups,
        token_ids=torch.from_numpy(token_ids),
        asked=torch.from_numpy(asked - 1),
        answers=torch.from_numpy(labels.ravel()[asked]),
        learners=learners,
    )
