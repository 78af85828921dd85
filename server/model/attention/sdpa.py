"""Attention over the paged cache by gathering blocks and calling PyTorch's own kernel: runs anywhere.

The plain twin that faster backends are tested against, and the backend for CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from server.model.attention.base import LayerCache, slots_of, tables_of


@dataclass(frozen=True)
class SdpaMetadata:
    """Where the T tokens of a step stand.

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


class SdpaAttention:
    """Causal attention with grouped heads and an optional sliding window (in tokens, the query's own included)."""

    def __init__(self, *, sliding_window: int | None) -> None:
        self.sliding_window = sliding_window

    def build_metadata(
        self,
        *,
        query_lens: Sequence[int],
        seq_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> SdpaMetadata:
        num_decodes = sum(length == 1 for length in query_lens)
        slots = slots_of(query_lens, seq_lens, block_tables, block_size)
        tables = tables_of(seq_lens, block_tables, block_size)
        return SdpaMetadata(
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
            block_tables=torch.tensor(tables, dtype=torch.int64, device=device),
            query_starts=[0, *accumulate(query_lens)],
            seq_lens=list(seq_lens),
            num_decodes=num_decodes,
            decode_mask=self._decode_mask(seq_lens[:num_decodes], block_size, device, dtype),
        )

    def _decode_mask(
        self, seq_lens: Sequence[int], block_size: int, device: torch.device, dtype: torch.dtype
    ) -> Tensor | None:
        """Additive [D, 1, 1, L]: 0 where a decode's query sees a cached position, -inf elsewhere."""
        if not seq_lens:
            return None
        length = -(-max(seq_lens) // block_size) * block_size
        positions = torch.arange(length, device=device)
        ends = torch.tensor(seq_lens, device=device)[:, None]
        visible = positions < ends
        if self.sliding_window is not None:
            visible &= positions >= ends - self.sliding_window
        mask = torch.zeros(visible.shape, dtype=dtype, device=device)
        return mask.masked_fill_(~visible, float("-inf"))[:, None, None, :]

    def forward(self, query: Tensor, key: Tensor, value: Tensor, cache: LayerCache, metadata: SdpaMetadata) -> Tensor:
        cache.key.flatten(0, 1).index_copy_(0, metadata.slot_mapping, _finite(key))
        cache.value.flatten(0, 1).index_copy_(0, metadata.slot_mapping, _finite(value))
        out = torch.empty_like(query)
        decodes = metadata.num_decodes
        if decodes:
            out[:decodes] = self._decode(query[:decodes], cache, metadata)
        for index in range(decodes, len(metadata.seq_lens)):
            start, end = metadata.query_starts[index : index + 2]
            context = metadata.seq_lens[index]
            if context == end - start:  # nothing cached before this chunk: its own keys are all there is
                out[start:end] = self._prefill(query[start:end], key[start:end], value[start:end])
            else:
                keys, values = _gather(cache, metadata.block_tables[index : index + 1], context)
                out[start:end] = self._prefill(query[start:end], keys[0], values[0])
        return out

    def _decode(self, query: Tensor, cache: LayerCache, metadata: SdpaMetadata) -> Tensor:
        """One query token a sequence. The heads that share a KV head become its query rows: no key is repeated."""
        mask = metadata.decode_mask
        if mask is None:
            raise ValueError("decodes need a mask")
        decodes, heads, head_dim = query.shape
        length = mask.shape[-1]
        keys, values = _gather(cache, metadata.block_tables[:decodes], length)  # [D, L, kv_heads, head_dim]
        kv_heads = keys.shape[2]
        grouped = query.view(decodes, kv_heads, heads // kv_heads, head_dim)
        attended = F.scaled_dot_product_attention(grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask)
        return attended.reshape(decodes, heads, head_dim)

    def _prefill(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The last [Q] tokens of a context of [C]: query [Q, heads, d], keys and values [C, kv_heads, d]."""
        length, context = query.shape[0], keys.shape[0]
        windowed = self.sliding_window is not None and context > self.sliding_window
        mask = None
        if length != context or windowed:
            rows = torch.arange(context - length, context, device=query.device)[:, None]
            columns = torch.arange(context, device=query.device)
            mask = columns <= rows
            if self.sliding_window is not None:
                mask &= columns > rows - self.sliding_window
        attended = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
        return attended[0].transpose(0, 1)


def _finite(rows: Tensor) -> Tensor:
    """What may be stored. A block outlives its request, and whoever reads past its own end in it masks what it finds
    there with a weight of 0; but 0 × NaN is NaN. The request that made it fails by its own logits."""
    return torch.nan_to_num(rows, nan=0.0, posinf=0.0, neginf=0.0)


def _gather(cache: LayerCache, tables: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, length, kv_heads, head_dim] of the first `length` positions of each block table.

    Selected by one flat list of blocks, which are then copied whole: indexing with the table itself goes number by
    number and takes twice as long.
    """
    _, block_size, kv_heads, head_dim = cache.key.shape
    num_blocks = -(-length // block_size)
    blocks = tables[:, :num_blocks].flatten()
    shape = (len(tables), num_blocks * block_size, kv_heads, head_dim)
    keys = cache.key.index_select(0, blocks).view(shape)
    values = cache.value.index_select(0, blocks).view(shape)
    return keys[:, :length], values[:, :length]
