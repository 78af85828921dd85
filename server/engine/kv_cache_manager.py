"""Gives requests their KV blocks and takes them back; finds and publishes reusable prefixes.

The one place where `request.block_ids` changes.
"""

from __future__ import annotations

from server.engine.block_pool import BlockPool
from server.engine.prefix_hash import BlockHasher
from server.engine.request import Request


class KVCacheManager:
    """Without `enable_prefix_caching`, blocks are shared between the answers to one prompt and by nobody else."""

    def __init__(self, *, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self._hasher = BlockHasher(block_size, is_shared=enable_prefix_caching)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find_prefix(self, request: Request) -> list[int]:
        """Cached blocks that a request with nothing computed may start from.

        At least its last token is always left to compute, since that one's logits are wanted.
        """
        if request.needs_whole_prompt:
            return []
        reusable = request.num_tokens - 1
        self._hasher.extend(request, reusable)
        return self.pool.lookup(request.block_hashes[: reusable // self.block_size])

    def can_admit(self, request: Request, prefix: list[int], *, spare: int) -> bool:
        """Whether all of a request's tokens fit beside `spare` blocks.

        A chunk alone would be too little to ask: half-computed prompts that crowd each other out only cost time.
        """
        missing = self.num_blocks_for(request.num_tokens) - len(prefix)
        return missing + self.pool.num_free_among(prefix) + spare <= self.pool.num_free

    def start(self, request: Request, prefix: list[int]) -> None:
        """Hold a found prefix for a request; its tokens count as computed."""
        if request.block_ids:
            raise ValueError(f"request {request.request_id} holds blocks already")
        self.pool.acquire(prefix)
        request.block_ids = list(prefix)
        request.num_published_blocks = len(prefix)
        request.num_computed_tokens = len(prefix) * self.block_size
        request.is_resumed = True

    def extend(self, request: Request, num_tokens: int) -> list[int] | None:
        """Blocks for `num_tokens` more tokens: those that were added, or None when there are too few."""
        needed = self.num_blocks_for(request.num_computed_tokens + num_tokens) - len(request.block_ids)
        if needed <= 0:
            return []
        added = self.pool.allocate(needed)
        if added is not None:
            request.block_ids += added
        return added

    def publish(self, request: Request) -> None:
        """Let later requests find the blocks that are computed in full."""
        full = request.num_computed_tokens // self.block_size
        if full == request.num_published_blocks:
            return
        self._hasher.extend(request, full * self.block_size)
        for index in range(request.num_published_blocks, full):
            self.pool.publish(request.block_ids[index], request.block_hashes[index])
        request.num_published_blocks = full

    def free(self, request: Request) -> None:
        """Give back all that a request holds."""
        self.pool.release(request.block_ids)
        request.block_ids = []
        request.num_published_blocks = 0
