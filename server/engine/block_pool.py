"""The KV blocks: who holds which, which are free, and which free ones still hold a prefix worth reusing.

        held (ref count > 0)  ──release──▶  free, least recently used first  ──allocate──▶  held
                 ▲                                     │
                 └──────────────acquire────────────────┘   (a prefix hit takes a free block back, content intact)

A block keeps its hash while free, until `allocate` hands it out for new content.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """`num_blocks` blocks with reference counts. All operations are O(blocks touched)."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, not {num_blocks}")
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks for new content, oldest free ones first, or None when there are too few."""
        if count > len(self._free):
            return None
        taken = []
        for _ in range(count):
            block_id, _ = self._free.popitem(last=False)
            self._forget_hash(block_id)
            self._ref_counts[block_id] = 1
            taken.append(block_id)
        return taken

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks that hold the longest known prefix of `hashes`. Takes nothing."""
        found = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def num_free_among(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks would leave the free list if they were acquired."""
        return sum(self._ref_counts[block_id] == 0 for block_id in block_ids)

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Hold blocks that `lookup` found."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._free[block_id]
            self._ref_counts[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Give back a request's blocks, in its token order: the tail is reused before the head of a prefix."""
        for block_id in reversed(block_ids):
            if self._ref_counts[block_id] < 1:
                raise ValueError(f"block {block_id} is released more often than it was taken")
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free[block_id] = None
                if self._hash_of[block_id] is None:
                    # Nothing to reuse in it: hand it out before any block that holds a prefix.
                    self._free.move_to_end(block_id, last=False)

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """Let others find a full block. The first block published under a hash stays the one that is found."""
        if block_hash not in self._block_of and self._hash_of[block_id] is None:
            self._block_of[block_hash] = block_id
            self._hash_of[block_id] = block_hash

    def _forget_hash(self, block_id: int) -> None:
        block_hash = self._hash_of[block_id]
        if block_hash is not None:
            del self._block_of[block_hash]
            self._hash_of[block_id] = None

    def check_integrity(self) -> None:
        """Raise if held and free blocks do not add up to all blocks, or a hash points astray."""
        held = sum(count > 0 for count in self._ref_counts)
        if held + len(self._free) != self.num_blocks:
            raise RuntimeError(f"{held} held + {len(self._free)} free blocks are not {self.num_blocks}")
        for block_id in self._free:
            if self._ref_counts[block_id] != 0:
                raise RuntimeError(f"block {block_id} is free with {self._ref_counts[block_id]} holders")
        for block_hash, block_id in self._block_of.items():
            if self._hash_of[block_id] != block_hash:
                raise RuntimeError(f"block {block_id} is found under a hash that it does not carry")
        if sum(block_hash is not None for block_hash in self._hash_of) != len(self._block_of):
            raise RuntimeError("a block carries a hash under which it cannot be found")
