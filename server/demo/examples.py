"""From a scene to what a training step reads: tiles, token ids, which of them are answers, and where letters stand."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from server.demo.canvas import Canvas
from server.demo.scenes.studio import Scene
from server.inputs.image_processor import cut_and_resize
from server.inputs.placeholders import PromptIds
from server.inputs.tokenizer import END_OF_UTTERANCE, Tokenizer
from server.types import ImageSettings

IGNORED = -100  # of a label: no loss here (torch's default of cross_entropy)
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ."
GLYPHS_A_PATCH = 2
GLYPHS_A_CELL = 6
NO_GLYPH = len(CHARACTERS)
NUM_GLYPH_CLASSES = len(CHARACTERS) + 1

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Example:
    """One conversation.

    tiles: uint8 [height, width, 3] each, in the order of the prompt
    glyphs: of each tile int64 [patches, 2], the classes of the first two letters whose middle lies in a patch
    cells: of each tile int64 [rows, 6], the classes of the first six letters in each cell of a grid over the tile that
        has as many cells as the tile has rows in the prompt
    token_ids: the whole conversation
    labels: of each id itself where it belongs to an answer, else IGNORED
    """

    tiles: list[npt.NDArray[np.uint8]]
    glyphs: list[Labels]
    cells: list[Labels]
    token_ids: list[int]
    labels: list[int]


class ExampleMaker:
    """Knows the checkpoint's tokenizer and sizes. Its ids are those that the server makes of the same conversation."""

    def __init__(self, folder: Path, *, images: ImageSettings, rows_per_tile: int, patch_size: int) -> None:
        self._tokenizer = Tokenizer(folder)
        self._images = images
        self._rows_per_tile = rows_per_tile
        self._patch_size = patch_size
        self._encode = functools.lru_cache(maxsize=1 << 16)(self._tokenizer.encode)
        self._end = self._tokenizer.special_tokens[END_OF_UTTERANCE]

    def make(self, scene: Scene, *, split: bool) -> Example:
        tiles: list[Image.Image] = []
        glyphs: list[Labels] = []
        cells: list[Labels] = []
        for canvas in scene.canvases:
            cut = cut_and_resize(canvas.image, split=split, settings=self._images)
            tiles += cut
            for box, tile in zip(_boxes(canvas, len(cut)), cut, strict=True):
                glyphs.append(self._by_patch(canvas, box, tile))
                cells.append(self._by_cell(canvas, box))
        ids, labels = self._conversation(scene, tiles_a_picture=5 if split else 1)
        return Example([np.asarray(tile) for tile in tiles], glyphs, cells, ids, labels)

    def _conversation(self, scene: Scene, *, tiles_a_picture: int) -> tuple[list[int], list[int]]:
        tokenizer = self._tokenizer
        prompt = PromptIds(tokenizer.fake_token_id, tokenizer.image_token_id, self._rows_per_tile)
        prompt.add_ids(list(tokenizer.bos_token_ids))
        labels: list[int] = []
        for index, question in enumerate(scene.questions):
            self._ask(prompt, scene, index, tiles_a_picture)
            prompt.add_ids([self._end, *self._encode("\nAssistant:", first=False)])
            labels += [IGNORED] * (len(prompt.token_ids) - len(labels))
            prompt_length = len(self._encode("\nAssistant:", first=False))
            answer = [*self._encode(f"\nAssistant: {question.answer}", first=False)[prompt_length:], self._end]
            prompt.add_ids(answer)
            labels += answer
        return prompt.token_ids, labels

    def _ask(self, prompt: PromptIds, scene: Scene, index: int, tiles_a_picture: int) -> None:
        text, opening = scene.questions[index].text, "User:" if index == 0 else "\nUser:"
        if not scene.canvases or index != scene.shown_at:
            prompt.add_ids(self._encode(f"{opening} {text}", first=index == 0))
            return
        prompt.add_ids(self._encode(f"{opening} {text}" if scene.text_first else opening, first=index == 0))
        for _ in scene.canvases:
            prompt.add_tiles(tiles_a_picture)
        if not scene.text_first:
            prompt.add_ids(self._encode(f" {text}", first=False))  # the space is the family's processor's

    def _by_patch(self, canvas: Canvas, box: Box, tile: Image.Image) -> Labels:
        """[patches, 2]; a patch with more letters than two is not to be read, and has no label."""
        columns, rows = tile.width // self._patch_size, tile.height // self._patch_size
        # What lies right of and below the last patch is not seen.
        seen = (columns * self._patch_size / tile.width, rows * self._patch_size / tile.height)
        labels = np.full((rows * columns, GLYPHS_A_PATCH), NO_GLYPH, dtype=np.int64)
        for place, letters in _letters_in(canvas, _part(box, *seen), columns, rows).items():
            labels[place, : len(letters)] = letters[:GLYPHS_A_PATCH]
            if len(letters) > GLYPHS_A_PATCH:
                labels[place] = IGNORED
        return labels

    def _by_cell(self, canvas: Canvas, box: Box) -> Labels:
        """[rows_per_tile, 6], of more letters the first."""
        side = math.isqrt(self._rows_per_tile)
        labels = np.full((self._rows_per_tile, GLYPHS_A_CELL), NO_GLYPH, dtype=np.int64)
        for place, letters in _letters_in(canvas, box, side, side).items():
            labels[place, : len(letters)] = letters[:GLYPHS_A_CELL]
        return labels


Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of a canvas


def _boxes(canvas: Canvas, num_tiles: int) -> list[Box]:
    """What each of a picture's tiles shows: all of it, after its quarters where it was split."""
    width, height = canvas.image.size
    whole = (0, 0, width, height)
    if num_tiles == 1:
        return [whole]
    across, down = width // 2, height // 2
    upper = [(0, 0, across, down), (across, 0, width, down)]
    return [*upper, (0, down, across, height), (across, down, width, height), whole]


def _part(box: Box, across: float, down: float) -> Box:
    """The upper left part of a box that has this share of its width and of its height."""
    left, top, right, bottom = box
    return left, top, left + across * (right - left), top + down * (bottom - top)


def _letters_in(canvas: Canvas, box: Box, columns: int, rows: int) -> dict[int, list[int]]:
    """The classes of the letters, line by line, in each cell of a grid over the box; cells without any are left out."""
    left, top, right, bottom = box
    across, down = columns / (right - left), rows / (bottom - top)
    found: dict[int, list[tuple[float, float, int]]] = {}
    for glyph in canvas.glyphs:
        column, row = (glyph.x - left) * across, (glyph.y - top) * down
        if 0 <= column < columns and 0 <= row < rows:
            place = int(row) * columns + int(column)
            found.setdefault(place, []).append((glyph.y, glyph.x, CHARACTERS.index(glyph.character)))
    return {place: [character for *_, character in sorted(letters)] for place, letters in found.items()}
