"""Attention over the paged cache by gathering blocks and calling PyTorch's own kernel: runs anywhere.

The plain twin that faster backends are tested against, and the backend for CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from server.model.attention.base import AttentionMetadata, LayerCache


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
    ) -> AttentionMetadata:
        num_decodes = sum(length == 1 for length in query_lens)
        starts = [0]
        slots: list[int] = []
        for query_len, seq_len, table in zip(query_lens, seq_lens, block_tables, strict=True):
            starts.append(starts[-1] + query_len)
            slots += (
                table[position // block_size] * block_size + position % block_size
                for position in range(seq_len - query_len, seq_len)
            )
        widest = max(-(-seq_len // block_size) for seq_len in seq_lens)
        tables = [[*table[:widest], *[0] * (widest - len(table))] for table in block_tables]
        return AttentionMetadata(
            slot_mapping=torch.tensor(slots, dtype=torch.int64, device=device),
            block_tables=torch.tensor(tables, dtype=torch.int64, device=device),
            query_starts=starts,
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

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, cache: LayerCache, metadata: AttentionMetadata
    ) -> Tensor:
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

    def _decode(self, query: Tensor, cache: LayerCache, metadata: AttentionMetadata) -> Tensor:
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
