"""What attention over the paged cache needs to know, and the interface every backend implements.

Knows nothing about requests: a batch is T packed tokens of B sequences, decodes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor


class LayerCache(NamedTuple):
    """One layer's keys and values, each [num_blocks, block_size, kv_heads, head_dim]."""

    key: Tensor
    value: Tensor


# Where the T tokens of a step stand. Built once a step, handed through every layer, and read by nobody but the backend
# that made it.
AttentionMetadata: TypeAlias = Any


class AttentionBackend(Protocol):
    """Attention over a paged cache. SDPA is the plain twin that every other backend is tested against."""

    def build_metadata(
        self,
        *,
        query_lens: Sequence[int],
        seq_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> AttentionMetadata:
        """Metadata for B sequences whose decodes (query length 1) come first."""
        ...

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, cache: LayerCache, metadata: AttentionMetadata
    ) -> Tensor:
        """Store the new keys and values, then attend.

        query [T, heads, head_dim], key and value [T, kv_heads, head_dim] → [T, heads, head_dim].
        """
        ...


def slots_of(
    query_lens: Sequence[int], seq_lens: Sequence[int], block_tables: Sequence[Sequence[int]], block_size: int
) -> list[int]:
    """block * block_size + offset of each new token, T in all."""
    return [
        table[position // block_size] * block_size + position % block_size
        for query_len, seq_len, table in zip(query_lens, seq_lens, block_tables, strict=True)
        for position in range(seq_len - query_len, seq_len)
    ]


def tables_of(seq_lens: Sequence[int], block_tables: Sequence[Sequence[int]], block_size: int) -> list[list[int]]:
    """The tables as far as the longest sequence needs them, those of shorter ones padded with 0."""
    widest = max(-(-seq_len // block_size) for seq_len in seq_lens)
    return [[*table[:widest], *[0] * (widest - len(table))] for table in block_tables]
