"""Slots of the slab that holds embedded tiles: pinned while a request still needs them, kept for the next turn after.

Every tile has the same number of rows, so a slot is an integer and nothing fragments. At most one tile at a time is in
part encoded: what a step has no budget for goes on in the next. Knows keys and sizes, not pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(slots=True)
class PartialTile:
    """The tile that is being encoded, for the request that it was begun for; `num_done` of its pixels are."""

    request_id: str
    index: int
    key: bytes
    slot: int
    num_pixels: int
    num_done: int = 0


class EncoderCache:
    """`num_slots` slots: free, the partial tile's, pinned by users, or unpinned and reusable (oldest dropped first)."""

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, not {num_slots}")
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._slot_of: dict[bytes, int] = {}
        self._pins: dict[bytes, int] = {}
        self._unpinned: OrderedDict[bytes, None] = OrderedDict()
        self.partial: PartialTile | None = None

    @property
    def num_available(self) -> int:
        """Slots that could be taken now."""
        return len(self._free) + len(self._unpinned)

    def __contains__(self, key: bytes) -> bool:
        """Whether a tile is here whole."""
        return key in self._slot_of

    def begin(self, request_id: str, index: int, key: bytes, num_pixels: int) -> bool:
        """Take a slot for a tile that is not here and make it the partial one; False when all are pinned."""
        if self.partial is not None or key in self._slot_of:
            raise ValueError("a tile is partial already, or here")
        if self._free:
            slot = self._free.pop()
        elif self._unpinned:
            oldest, _ = self._unpinned.popitem(last=False)
            slot = self._slot_of.pop(oldest)
        else:
            return False
        self.partial = PartialTile(request_id, index, key, slot, num_pixels)
        return True

    def advance(self, num_pixels: int) -> None:
        """So many more pixels of the partial tile are encoded; with the last of them it is here, unpinned."""
        if self.partial is None:
            raise ValueError("no tile is partial")
        self.partial.num_done += num_pixels
        if self.partial.num_done >= self.partial.num_pixels:
            self._slot_of[self.partial.key] = self.partial.slot
            self._unpinned[self.partial.key] = None
            self.partial = None

    def abandon(self, request_id: str) -> None:
        """Let go of the partial tile if it was begun for this request: whoever else wants it begins it again."""
        if self.partial is not None and self.partial.request_id == request_id:
            self._free.append(self.partial.slot)
            self.partial = None

    def touch(self, key: bytes) -> None:
        """Keep a tile that is soon needed for longer than those that are not."""
        if key in self._unpinned:
            self._unpinned.move_to_end(key)

    def pin(self, key: bytes) -> int:
        """Keep a tile that is here until it is unpinned as often. Returns its slot."""
        slot = self._slot_of[key]
        self._unpinned.pop(key, None)
        self._pins[key] = self._pins.get(key, 0) + 1
        return slot

    def unpin(self, key: bytes) -> None:
        """Undo one `pin`; the content stays until its slot is needed."""
        self._pins[key] -= 1
        if self._pins[key] == 0:
            del self._pins[key]
            if key in self._slot_of:
                self._unpinned[key] = None

    def discard(self, key: bytes) -> None:
        """Forget a tile, partial or unpinned, whose content is not to be trusted."""
        if self.partial is not None and self.partial.key == key:
            self.abandon(self.partial.request_id)
        elif key in self._unpinned:
            del self._unpinned[key]
            self._free.append(self._slot_of.pop(key))

    def pin_counts(self) -> dict[bytes, int]:
        """How often each pinned key is pinned."""
        return dict(self._pins)

    def check_integrity(self) -> None:
        """Raise if free, partial, pinned and unpinned slots do not add up."""
        used = [*self._slot_of.values(), *([self.partial.slot] if self.partial is not None else [])]
        if len(self._free) + len(used) != self.num_slots:
            raise RuntimeError(f"{len(self._free)} free + {len(used)} used slots are not {self.num_slots}")
        if set(self._slot_of) != set(self._pins) | set(self._unpinned) or set(self._pins) & set(self._unpinned):
            raise RuntimeError("slots in use are not exactly those pinned or unpinned")
        if len({*self._free, *used}) != self.num_slots:
            raise RuntimeError("a slot is used twice")
