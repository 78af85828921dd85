"""Encodes tiles into the slab. Tiles of one size go through together; different sizes are never padded."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from server.engine.step import TileToEncode
from server.model.idefics2 import Idefics2Model
from server.runner.input_batch import RequestState
from server.types import Tile

logger = logging.getLogger(__name__)


class VisionRunner:
    """Owns the slab [num_slots, rows_per_tile, hidden] of embedded tiles."""

    def __init__(
        self, model: Idefics2Model, *, num_slots: int, rows_per_tile: int, hidden: int, device: torch.device
    ) -> None:
        self._model = model
        self._device = device
        dtype = next(model.parameters()).dtype
        self.slab = torch.zeros((num_slots, rows_per_tile, hidden), device=device, dtype=dtype)

    @property
    def rows(self) -> Tensor:
        """The slab as [num_slots * rows_per_tile, hidden]."""
        return self.slab.flatten(0, 1)

    def encode(self, tiles: Sequence[TileToEncode], states: Mapping[str, RequestState]) -> set[int]:
        """Fill the slots of these tiles. Returns the slots that could not be filled."""
        by_size: defaultdict[tuple[int, int], list[tuple[int, Tile]]] = defaultdict(list)
        for item in tiles:
            tile = states[item.request_id].source.tiles[item.index]
            by_size[tile.height, tile.width].append((item.slot, tile))
        failed: set[int] = set()
        for group in by_size.values():
            failed |= self._encode_group(group)
        return failed

    def _encode_group(self, group: list[tuple[int, Tile]]) -> set[int]:
        try:
            pixels = torch.stack([_pixels(tile) for _, tile in group]).to(self._device)
            self.slab[[slot for slot, _ in group]] = self._model.encode_tiles(pixels)
        except Exception:
            if len(group) > 1:  # find out whose tile it is
                return set().union(*(self._encode_group([item]) for item in group))
            slot, tile = group[0]
            logger.exception("encoding a tile of %d×%d failed", tile.width, tile.height)
            return {slot}
        return set()


def _pixels(tile: Tile) -> Tensor:
    """uint8 [height, width, 3]. Copied, since torch wants memory that it may write to."""
    return torch.frombuffer(bytearray(tile.pixels), dtype=torch.uint8).view(tile.height, tile.width, 3)
