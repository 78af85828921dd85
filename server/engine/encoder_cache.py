"""Slots of the slab that holds embedded tiles: pinned while a request still needs them, kept for the next turn after.

Every tile has the same number of rows, so a slot is an integer and nothing fragments. Knows keys, not pixels.
"""

from __future__ import annotations

from collections import OrderedDict


class EncoderCache:
    """`num_slots` slots, each free, pinned by one or more users, or unpinned and reusable (oldest dropped first)."""

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, not {num_slots}")
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._slot_of: dict[bytes, int] = {}
        self._pins: dict[bytes, int] = {}
        self._unpinned: OrderedDict[bytes, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Slots that could be taken now."""
        return len(self._free) + len(self._unpinned)

    def __contains__(self, key: bytes) -> bool:
        return key in self._slot_of

    def is_pinned(self, key: bytes) -> bool:
        return key in self._pins

    def pin(self, key: bytes) -> int | None:
        """Pin a key's slot, taking one if it has none yet (the caller then fills it). None when all are pinned."""
        slot = self._slot_of.get(key)
        if slot is None:
            if self._free:
                slot = self._free.pop()
            elif self._unpinned:
                oldest, _ = self._unpinned.popitem(last=False)
                slot = self._slot_of.pop(oldest)
            else:
                return None
            self._slot_of[key] = slot
        else:
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
        """Forget an unpinned key whose content is not to be trusted."""
        if key in self._unpinned:
            del self._unpinned[key]
            self._free.append(self._slot_of.pop(key))

    def pin_counts(self) -> dict[bytes, int]:
        """How often each pinned key is pinned."""
        return dict(self._pins)

    def check_integrity(self) -> None:
        """Raise if free, pinned and unpinned slots do not add up."""
        if len(self._free) + len(self._slot_of) != self.num_slots:
            raise RuntimeError(f"{len(self._free)} free + {len(self._slot_of)} used slots are not {self.num_slots}")
        if set(self._slot_of) != set(self._pins) | set(self._unpinned) or set(self._pins) & set(self._unpinned):
            raise RuntimeError("slots in use are not exactly those pinned or unpinned")
        if len({*self._free, *self._slot_of.values()}) != self.num_slots:
            raise RuntimeError("a slot is used twice")
