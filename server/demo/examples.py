"""From a scene to what a training step reads: tiles, token ids, which of them are answers, and where letters stand."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from server.demo.canvas import Canvas, Glyph, Mark, Word
from server.demo.lexicon import WORDS
from server.demo.scenes.studio import Scene
from server.demo.shapes import LOOKS
from server.inputs.image_processor import cut_and_resize
from server.inputs.placeholders import PromptIds
from server.inputs.tokenizer import END_OF_UTTERANCE, Tokenizer
from server.types import ImageSettings

IGNORED = -100  # of a label: no loss here (torch's default of cross_entropy)
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ."
GLYPHS_A_PATCH = 2
GLYPHS_A_CELL = 8
WORDS_A_CELL = 2
NO_GLYPH = len(CHARACTERS)
NUM_GLYPH_CLASSES = len(CHARACTERS) + 1
NO_WORD = len(WORDS)
NO_MARK = len(LOOKS)
# Tokens beside those of pictures: of a conversation, and what a turn is thought to take. All in a batch are padded to
# the longest, so that few long ones would be half of its cost.
MOST_WORDS, TURN_WORDS = 90, 25
READABLE = 4.0  # pixels of a capital in a tile, below which nothing is to be learnt from letters

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Example:
    """One conversation.

    tiles: uint8 [height, width, 3] each, in the order of the prompt
    patches: of each tile int64 [patches, 2], the classes of the first two letters whose middle lies in a patch
    cells: of each tile int64 [rows, 8], the classes of the first eight letters in each cell of a grid over the tile
        that has as many cells as the tile has rows in the prompt
    words: of each tile int64 [rows, 2], the classes of the first two words whose middle lies in such a cell
    marks: of each tile int64 [rows, 1], the class of a coloured shape there
    token_ids: the whole conversation
    labels: of each id itself where it belongs to an answer, else IGNORED
    """

    tiles: list[npt.NDArray[np.uint8]]
    patches: list[Labels]
    cells: list[Labels]
    words: list[Labels]
    marks: list[Labels]
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
        """The scene as an example, without those of its last questions that make the conversation too long."""
        example = Example([], [], [], [], [], *self._conversation(scene, tiles_a_picture=5 if split else 1))
        for canvas in scene.canvases:
            cut = cut_and_resize(canvas.image, split=split, settings=self._images)
            for box, tile in zip(_boxes(canvas, len(cut)), cut, strict=True):
                self._add_tile(example, canvas, box, tile)
        return example

    def _add_tile(self, example: Example, canvas: Canvas, box: Box, tile: Image.Image) -> None:
        labels = {
            "patches": self._by_patch(canvas, box, tile),
            "cells": self._by_cell(canvas.glyphs, box, GLYPHS_A_CELL, NO_GLYPH),
            "words": self._by_cell(canvas.words, box, WORDS_A_CELL, NO_WORD),
        }
        if canvas.smallest * tile.height / (box[3] - box[1]) < READABLE:
            labels = {name: np.full_like(label, IGNORED) for name, label in labels.items()}
        example.tiles.append(np.asarray(tile))
        example.patches.append(labels["patches"])
        example.cells.append(labels["cells"])
        example.words.append(labels["words"])
        example.marks.append(self._by_cell(canvas.marks, box, 1, NO_MARK))

    def _conversation(self, scene: Scene, *, tiles_a_picture: int) -> tuple[list[int], list[int]]:
        tokenizer = self._tokenizer
        prompt = PromptIds(tokenizer.fake_token_id, tokenizer.image_token_id, self._rows_per_tile)
        prompt.add_ids(list(tokenizer.bos_token_ids))
        labels: list[int] = []
        most = MOST_WORDS + self._rows_per_tile * tiles_a_picture * len(scene.canvases)
        for index, question in enumerate(scene.questions):
            if index > scene.shown_at and len(labels) > most - TURN_WORDS:
                break
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
        for place, letters in _found_in(canvas.glyphs, _part(box, *seen), columns, rows).items():
            labels[place, : len(letters)] = letters[:GLYPHS_A_PATCH]
            if len(letters) > GLYPHS_A_PATCH:
                labels[place] = IGNORED
        return labels

    def _by_cell(self, written: Written, box: Box, most: int, none: int) -> Labels:
        """[rows_per_tile, most], of more the first."""
        side = math.isqrt(self._rows_per_tile)
        labels = np.full((self._rows_per_tile, most), none, dtype=np.int64)
        for place, classes in _found_in(written, box, side, side).items():
            labels[place, : len(classes)] = classes[:most]
        return labels


Written = Sequence[Glyph] | Sequence[Word] | Sequence[Mark]
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


def _found_in(written: Written, box: Box, columns: int, rows: int) -> dict[int, list[int]]:
    """The classes of what has its middle in each cell of a grid over the box, line by line, without empty cells."""
    left, top, right, bottom = box
    across, down = columns / (right - left), rows / (bottom - top)
    found: dict[int, list[tuple[float, float, int]]] = {}
    for item in written:
        column, row = (item.x - left) * across, (item.y - top) * down
        if 0 <= column < columns and 0 <= row < rows:
            kind = CHARACTERS.index(item.character) if isinstance(item, Glyph) else item.place
            found.setdefault(int(row) * columns + int(column), []).append((item.y, item.x, kind))
    return {place: [kind for *_, kind in sorted(items)] for place, items in found.items()}
