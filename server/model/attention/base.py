"""What attention over the paged cache needs to know, and the interface every backend implements.

Knows nothing about requests: a batch is T packed tokens of B sequences, decodes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class LayerCache(NamedTuple):
    """One layer's keys and values, each [num_blocks, block_size, kv_heads, head_dim]."""

    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class AttentionMetadata:
    """Where the T tokens of a step stand. Built once a step, read by every layer.

    Sequences 0..num_decodes-1 have exactly one new token each; the others are prefill chunks.

    slot_mapping:  [T] int64, block * block_size + offset of each new token
    block_tables:  [B, max_blocks] int64, padded with 0
    query_starts:  B + 1 offsets into the T tokens
    seq_lens:      B lengths, new tokens included
    decode_mask:   [num_decodes, 1, 1, max context of the decodes] additive, or None when there is no decode
    """

    slot_mapping: Tensor
    block_tables: Tensor
    query_starts: Sequence[int]
    seq_lens: Sequence[int]
    num_decodes: int
    decode_mask: Tensor | None


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
