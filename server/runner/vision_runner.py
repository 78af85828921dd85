"""Encodes tiles into the slab. Tiles of one size go through together; different sizes are never padded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.engine.step import TileToEncode
from server.model.idefics2 import Idefics2Model
from server.runner.input_batch import RequestState
from server.runner.isolation import isolate
from server.types import Tile


@dataclass
class UnfilledSlots:
    """Slots whose tile cannot be encoded, and those whose tile could not be for lack of memory."""

    broken: set[int] = field(default_factory=set)
    starved: set[int] = field(default_factory=set)


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

    def encode(self, tiles: Sequence[TileToEncode], states: Mapping[str, RequestState]) -> UnfilledSlots:
        """Fill the slots of these tiles. Returns those that could not be filled. Raises EngineBrokenError."""
        by_size: defaultdict[tuple[int, int], list[tuple[int, Tile]]] = defaultdict(list)
        for item in tiles:
            tile = states[item.request_id].source.tiles[item.index]
            by_size[tile.height, tile.width].append((item.slot, tile))
        unfilled = UnfilledSlots()
        for group in by_size.values():
            found = isolate(group, self._encode_group, _name)
            unfilled.broken |= {slot for slot, _ in found.broken}
            unfilled.starved |= {slot for slot, _ in found.starved}
        return unfilled

    def _encode_group(self, group: Sequence[tuple[int, Tile]]) -> None:
        pixels = torch.stack([_pixels(tile) for _, tile in group]).to(self._device)
        self.slab[[slot for slot, _ in group]] = self._model.encode_tiles(pixels)


def _name(item: tuple[int, Tile]) -> str:
    slot, tile = item
    return f"encoding a tile of {tile.width}×{tile.height} into slot {slot}"


def _pixels(tile: Tile) -> Tensor:
    """uint8 [height, width, 3]. Copied, since torch wants memory that it may write to."""
    return torch.frombuffer(bytearray(tile.pixels), dtype=torch.uint8).view(tile.height, tile.width, 3)
