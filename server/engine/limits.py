"""What a step and the caches may hold."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    """`num_blocks` and `num_tile_slots` are what the hardware allowed. Raises ValueError for what cannot work."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_batched_pixels: int
    max_model_len: int
    block_size: int
    num_blocks: int
    num_tile_slots: int
    enable_prefix_caching: bool

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError("max_num_batched_tokens must be at least max_num_seqs")
        if self.num_blocks * self.block_size < self.max_model_len:
            raise ValueError(
                f"{self.num_blocks} blocks of {self.block_size} tokens cannot hold one request of {self.max_model_len}"
            )
