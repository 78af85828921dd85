"""Attention over the paged cache without gathering it: keys and values are read where they are, by kernels of ours.

For CUDA. Decodes are split over their keys, so that few long ones fill a device too; the splits are of one length, so a
sequence's numbers are the same whatever it is batched with. `SdpaAttention` is the plain twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.model.attention.base import LayerCache, slots_of, tables_of
from server.model.attention.triton_kernels import chunk_kernel, decode_kernel, merge_kernel, store_kernel

SPLIT = 256  # keys that one program of a decode reads
KEYS = 64  # keys that are multiplied at once
CHUNK_ROWS = 64  # queries that are multiplied at once, heads that share keys side by side
MIN_ROWS = 16  # the least that the matrix units take


@dataclass(frozen=True)
class ChunkTiles:
    """The chunks of a step in tiles of equally many tokens.

    query_starts      [B + 1] int32 offsets into the T tokens
    sequences         [N] int32: whose each tile is
    offsets           [N] int32: its first token, counted in its sequence's chunk
    """

    query_starts: Tensor
    sequences: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class PagedMetadata:
    """Where the T tokens of a step stand; all tensors are on the device, so that a graph can be fed through them.

    slot_mapping   [T] integers, block * block_size + offset of each new token; negative: not to be stored
    block_tables   [B, max_blocks] int32
    seq_lens       [B] int32, new tokens included; 0 for a decode that only fills a batch up
    num_decodes    sequences 0..num_decodes-1 have exactly one new token each
    num_splits     at least ceil(longest decode / SPLIT)
    chunks         of the other sequences; None where there is none
    """

    slot_mapping: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    num_decodes: int
    num_splits: int
    chunks: ChunkTiles | None


class TritonAttention:
    """Causal attention with grouped heads and an optional sliding window (in tokens, the query's own included)."""

    def __init__(self, *, num_heads: int, num_kv_heads: int, head_dim: int, sliding_window: int | None) -> None:
        self._num_heads = num_heads
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self._window = sliding_window or 0
        self._group = num_heads // num_kv_heads
        self._group_rows = _power_of_two(self._group)
        self._chunk_rows = max(CHUNK_ROWS, self._group_rows)

    def build_metadata(
        self,
        *,
        query_lens: Sequence[int],
        seq_lens: Sequence[int],
        block_tables: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> PagedMetadata:
        num_decodes = sum(length == 1 for length in query_lens)
        slots = slots_of(query_lens, seq_lens, block_tables, block_size)
        tables = tables_of(seq_lens, block_tables, block_size)
        return PagedMetadata(
            slot_mapping=_int32(slots, device),
            block_tables=_int32(tables, device),
            seq_lens=_int32(seq_lens, device),
            num_decodes=num_decodes,
            num_splits=num_splits_for(max(seq_lens[:num_decodes], default=0)),
            chunks=self._tiles(query_lens, num_decodes, device) if num_decodes < len(query_lens) else None,
        )

    def decode_metadata(
        self, *, slot_mapping: Tensor, block_tables: Tensor, seq_lens: Tensor, max_context: int
    ) -> PagedMetadata:
        """Metadata for decodes alone whose tensors may be filled anew between calls, as PagedMetadata says."""
        return PagedMetadata(
            slot_mapping=slot_mapping,
            block_tables=block_tables,
            seq_lens=seq_lens,
            num_decodes=len(seq_lens),
            num_splits=num_splits_for(max_context),
            chunks=None,
        )

    def _tiles(self, query_lens: Sequence[int], num_decodes: int, device: torch.device) -> ChunkTiles:
        tokens = self._chunk_rows // self._group_rows
        starts = [0]
        sequences: list[int] = []
        offsets: list[int] = []
        for index, query_len in enumerate(query_lens):
            starts.append(starts[-1] + query_len)
            if index >= num_decodes:
                firsts = range(0, query_len, tokens)
                sequences += [index] * len(firsts)
                offsets += firsts
        return ChunkTiles(*(_int32(values, device) for values in (starts, sequences, offsets)))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, cache: LayerCache, metadata: PagedMetadata) -> Tensor:
        """Store the new keys and values, then attend. [T, heads, head_dim], as AttentionBackend says.

        Only the last dimension of what comes in needs to be without gaps, and that of heads in keys and values.
        """
        row = self._num_kv_heads * self._head_dim
        store_kernel[(len(query),)](
            key,
            value,
            cache.key,
            cache.value,
            metadata.slot_mapping,
            key.stride(0),
            value.stride(0),
            ROW=row,
            BLOCK=_power_of_two(row),
        )
        out = torch.empty((len(query), self._num_heads, self._head_dim), dtype=query.dtype, device=query.device)
        if metadata.num_decodes:
            self._decode(query, cache, metadata, out)
        if metadata.chunks is not None:
            self._chunks(query, cache, metadata, metadata.chunks, out)
        return out

    def _decode(self, query: Tensor, cache: LayerCache, metadata: PagedMetadata, out: Tensor) -> None:
        parts = (metadata.num_decodes, self._num_heads, metadata.num_splits)
        sums = torch.empty((*parts, self._head_dim), dtype=torch.float32, device=query.device)
        weights, highest = (torch.empty(parts, dtype=torch.float32, device=query.device) for _ in range(2))
        decode_kernel[metadata.num_decodes, self._num_kv_heads, metadata.num_splits](
            query,
            cache.key,
            cache.value,
            metadata.block_tables,
            metadata.seq_lens,
            sums,
            weights,
            highest,
            self._head_dim**-0.5,
            query.stride(0),
            query.stride(1),
            metadata.block_tables.stride(0),
            metadata.num_splits,
            WINDOW=self._window,
            BLOCK_SIZE=cache.key.shape[1],
            KV_HEADS=self._num_kv_heads,
            GROUP=self._group,
            HEAD_DIM=self._head_dim,
            ROWS=max(MIN_ROWS, self._group_rows),
            DIM=max(MIN_ROWS, _power_of_two(self._head_dim)),
            KEYS=KEYS,
            SPLIT=SPLIT,
            PRECISION=_precision(query),
        )
        merge_kernel[metadata.num_decodes, self._num_heads](
            sums,
            weights,
            highest,
            metadata.seq_lens,
            out,
            metadata.num_splits,
            WINDOW=self._window,
            HEADS=self._num_heads,
            HEAD_DIM=self._head_dim,
            DIM=_power_of_two(self._head_dim),
            SPLIT=SPLIT,
        )

    def _chunks(
        self, query: Tensor, cache: LayerCache, metadata: PagedMetadata, tiles: ChunkTiles, out: Tensor
    ) -> None:
        chunk_kernel[len(tiles.sequences), self._num_kv_heads](
            query,
            cache.key,
            cache.value,
            metadata.block_tables,
            metadata.seq_lens,
            tiles.query_starts,
            tiles.sequences,
            tiles.offsets,
            out,
            self._head_dim**-0.5,
            query.stride(0),
            query.stride(1),
            metadata.block_tables.stride(0),
            WINDOW=self._window,
            BLOCK_SIZE=cache.key.shape[1],
            KV_HEADS=self._num_kv_heads,
            GROUP=self._group,
            GROUP_ROWS=self._group_rows,
            HEAD_DIM=self._head_dim,
            ROWS=self._chunk_rows,
            DIM=max(MIN_ROWS, _power_of_two(self._head_dim)),
            KEYS=KEYS,
            PRECISION=_precision(query),
        )


def num_splits_for(context: int) -> int:
    """Programs that share the keys of one decode of that many tokens."""
    return max(-(-context // SPLIT), 1)


def _int32(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """On the device without waiting for what it still computes."""
    tensor = torch.tensor(values, dtype=torch.int32)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _power_of_two(count: int) -> int:
    """The least one that is not below."""
    return 1 << (count - 1).bit_length()


def _precision(query: Tensor) -> str:
    """Of products: float32 is multiplied as it is, since the plain twin does so; narrower numbers are exact anyway."""
    return "ieee" if query.dtype == torch.float32 else "tf32"
