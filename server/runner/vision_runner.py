"""Encodes tiles into the slab. Tiles of one size go through together; different sizes are never padded.

A tile that is too large for a step goes through alone, some layers a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.engine.step import TileToEncode
from server.model.idefics2 import Idefics2Model
from server.model.parts import run_to_end
from server.runner.input_batch import RequestState
from server.runner.isolation import Isolated, isolate
from server.types import Tile


@dataclass
class UnfilledSlots:
    """Slots whose tile cannot be encoded, and those whose tile could not be for lack of memory."""

    broken: set[int] = field(default_factory=set)
    starved: set[int] = field(default_factory=set)

    def add(self, found: Isolated[tuple[TileToEncode, Tile], None]) -> None:
        self.broken |= {item.slot for item, _ in found.broken}
        self.starved |= {item.slot for item, _ in found.starved}


class PartialEncoding:
    """A tile on its way through the model. What a step has computed of it is kept for the next."""

    def __init__(self, item: TileToEncode, model: Idefics2Model, pixels: Tensor) -> None:
        """`pixels` are the tile's alone, as `Idefics2Model.encode_tiles` takes them."""
        self._tile = (item.slot, item.key)
        self._parts = model.encode_in_parts(pixels)
        self._num_parts = model.num_encoding_parts(*pixels.shape[1:3])
        self._num_done = 0

    def is_of(self, item: TileToEncode) -> bool:
        return self._tile == (item.slot, item.key)

    def advance(self, until: float) -> Tensor | None:
        """Compute what `until`, a share of all parts, still lacks, to the nearest. Returns rows [1, R, hidden] at 1."""
        while self._num_done < round(until * self._num_parts):
            next(self._parts)
            self._num_done += 1
        return run_to_end(self._parts) if until >= 1 else None


class VisionRunner:
    """Owns the slab [num_slots, rows_per_tile, hidden] of embedded tiles."""

    def __init__(
        self, model: Idefics2Model, *, num_slots: int, rows_per_tile: int, hidden: int, device: torch.device
    ) -> None:
        self._model = model
        self._device = device
        self._partial: PartialEncoding | None = None
        dtype = next(model.parameters()).dtype
        self.slab = torch.zeros((num_slots, rows_per_tile, hidden), device=device, dtype=dtype)

    @property
    def rows(self) -> Tensor:
        """The slab as [num_slots * rows_per_tile, hidden]."""
        return self.slab.flatten(0, 1)

    def encode(self, tiles: Sequence[TileToEncode], states: Mapping[str, RequestState]) -> UnfilledSlots:
        """Advance these tiles and fill the slots of those that end. Returns those that could not be.

        Raises EngineBrokenError.
        """
        whole: defaultdict[tuple[int, int], list[tuple[TileToEncode, Tile]]] = defaultdict(list)
        unfilled = UnfilledSlots()
        for item in tiles:
            tile = states[item.request_id].source.tiles[item.index]
            if item.is_last_share and not self._has_begun(item):
                whole[tile.height, tile.width].append((item, tile))
            else:
                unfilled.add(isolate([(item, tile)], self._encode_share, _name))
        for group in whole.values():
            unfilled.add(isolate(group, self._encode_whole, _name))
        return unfilled

    def _has_begun(self, item: TileToEncode) -> bool:
        return self._partial is not None and self._partial.is_of(item)

    def _encode_share(self, group: Sequence[tuple[TileToEncode, Tile]]) -> None:
        """Of one tile. Where that fails, a second try begins anew."""
        ((item, tile),) = group
        partial, self._partial = self._partial, None
        if partial is None or not partial.is_of(item):
            partial = PartialEncoding(item, self._model, self._pixels([tile]))
        rows = partial.advance(item.until)
        if rows is None:
            self._partial = partial
        else:
            self.slab[item.slot] = rows[0]

    def _encode_whole(self, group: Sequence[tuple[TileToEncode, Tile]]) -> None:
        """Of tiles of one size."""
        rows = self._model.encode_tiles(self._pixels([tile for _, tile in group]))
        self.slab[[item.slot for item, _ in group]] = rows

    def _pixels(self, tiles: Sequence[Tile]) -> Tensor:
        """uint8 [N, height, width, 3] of tiles of one size. Copied, since torch wants memory that it may write to."""
        return torch.stack(
            [
                torch.frombuffer(bytearray(tile.pixels), dtype=torch.uint8).view(tile.height, tile.width, 3)
                for tile in tiles
            ]
        ).to(self._device)


def _name(item: tuple[TileToEncode, Tile]) -> str:
    share, tile = item
    return f"encoding a tile of {tile.width}×{tile.height} into slot {share.slot}"
