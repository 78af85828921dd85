"""The kernels behind `triton_paged`: storing keys and values, decodes in splits, chunks of prompts.

Pointers are to the first number of a tensor; a cache is [num_blocks, block_size, kv_heads, head_dim] without gaps.
Where a row has no key to see, weights and sums are 0 and finite: scores start from `LOWEST`, not from -inf.

The online softmax is that of FlashAttention (Dao et al., arXiv 2205.14135), the split of a decode's keys over programs
that of Flash-Decoding (Dao et al., 2023), and keys are found through a block table as in PagedAttention (Kwon et al.,
arXiv 2309.06180).
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)


@triton.jit
def store_kernel(
    key, value, key_cache, value_cache, slots, key_stride, value_stride, ROW: tl.constexpr, BLOCK: tl.constexpr
):
    """Program t: row t [ROW] of key and value goes to slot t of the caches, or nowhere if that is negative.

    What is not finite is stored as 0. `ROW` is kv_heads * head_dim, `BLOCK` a power of two that holds it.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot >= 0:
        columns = tl.arange(0, BLOCK)
        mask = columns < ROW
        new_key = tl.load(key + token * key_stride + columns, mask=mask, other=0.0)
        new_value = tl.load(value + token * value_stride + columns, mask=mask, other=0.0)
        new_key = tl.where(tl.abs(new_key.to(tl.float32)) < float("inf"), new_key, 0.0)
        new_value = tl.where(tl.abs(new_value.to(tl.float32)) < float("inf"), new_value, 0.0)
        tl.store(key_cache + slot * ROW + columns, new_key, mask=mask)
        tl.store(value_cache + slot * ROW + columns, new_value, mask=mask)


@triton.jit
def _attend(
    rows,  # [ROWS, DIM] queries
    seen_from,  # [ROWS] first and last position that each row sees
    seen_to,
    begin,  # positions that are looked at
    end,
    table,
    key_cache,
    value_cache,
    kv_head,
    scale,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The rows over the positions [begin, end) of one sequence: sums [ROWS, DIM], their weights' sum and maximum."""
    dims = tl.arange(0, DIM)
    highest = tl.full([ROWS], LOWEST, dtype=tl.float32)
    weights = tl.zeros([ROWS], dtype=tl.float32)
    sums = tl.zeros([ROWS, DIM], dtype=tl.float32)
    for start in range(begin, end, KEYS):
        positions = start + tl.arange(0, KEYS)
        inside = positions < end
        blocks = tl.load(table + positions // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        places = ((blocks * BLOCK_SIZE + positions % BLOCK_SIZE) * KV_HEADS + kv_head) * HEAD_DIM
        keys = tl.load(
            key_cache + places[None, :] + dims[:, None],
            mask=inside[None, :] & (dims < HEAD_DIM)[:, None],
            other=0.0,
        )
        scores = tl.dot(rows, keys, input_precision=PRECISION) * scale
        visible = (
            inside[None, :] & (positions[None, :] >= seen_from[:, None]) & (positions[None, :] <= seen_to[:, None])
        )
        scores = tl.where(visible, scores, LOWEST)
        higher = tl.maximum(highest, tl.max(scores, 1))
        exponentials = tl.where(visible, tl.exp(scores - higher[:, None]), 0.0)
        shrink = tl.exp(highest - higher)
        values = tl.load(
            value_cache + places[:, None] + dims[None, :],
            mask=inside[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        )
        weights = weights * shrink + tl.sum(exponentials, 1)
        sums = sums * shrink[:, None] + tl.dot(exponentials.to(values.dtype), values, input_precision=PRECISION)
        highest = higher
    return sums, weights, highest


@triton.jit
def decode_kernel(
    query,
    key_cache,
    value_cache,
    block_tables,
    seq_lens,
    part_sums,  # [sequences, heads, splits, HEAD_DIM] float32
    part_weights,  # [sequences, heads, splits] float32
    part_highest,
    scale,
    query_token_stride,
    query_head_stride,
    table_stride,
    num_splits,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (sequence, KV head, split): the heads of that KV head over the keys [split * SPLIT, (split + 1) * SPLIT).

    A `WINDOW` of 0 is none. Splits without a visible key write nothing.
    """
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(seq_lens + sequence)
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else length * 0
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, length)
    if end > tl.maximum(begin, first):
        begin = tl.maximum(begin, first // KEYS * KEYS)
        group = tl.arange(0, ROWS)
        dims = tl.arange(0, DIM)
        heads = kv_head * GROUP + group
        rows = tl.load(
            query + sequence * query_token_stride + heads[:, None] * query_head_stride + dims[None, :],
            mask=(group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        )
        sums, weights, highest = _attend(
            rows,
            group * 0 + first,
            group * 0 + length - 1,
            begin,
            end,
            block_tables + sequence * table_stride,
            key_cache,
            value_cache,
            kv_head,
            scale,
            BLOCK_SIZE,
            KV_HEADS,
            HEAD_DIM,
            ROWS,
            DIM,
            KEYS,
            PRECISION,
        )
        place = (sequence * KV_HEADS * GROUP + heads) * num_splits + split
        tl.store(
            part_sums + place[:, None] * HEAD_DIM + dims[None, :],
            sums,
            mask=(group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :],
        )
        tl.store(part_weights + place, weights, mask=group < GROUP)
        tl.store(part_highest + place, highest, mask=group < GROUP)


@triton.jit
def merge_kernel(
    part_sums,
    part_weights,
    part_highest,
    seq_lens,
    out,  # [sequences, heads, HEAD_DIM]
    num_splits,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Program (sequence, head): what the splits of `decode_kernel` found, in their order; 0 where there is no key."""
    sequence = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    length = tl.load(seq_lens + sequence)
    first = tl.maximum(length - WINDOW, 0) if WINDOW > 0 else length * 0
    dims = tl.arange(0, DIM)
    mask = dims < HEAD_DIM
    highest = tl.full([1], LOWEST, dtype=tl.float32)
    weights = tl.zeros([1], dtype=tl.float32)
    sums = tl.zeros([DIM], dtype=tl.float32)
    for split in range(first // SPLIT, tl.cdiv(length, SPLIT)):
        place = (sequence * HEADS + head) * num_splits + split
        part_high = tl.load(part_highest + place)
        higher = tl.maximum(highest, part_high)
        shrink = tl.exp(highest - higher)
        part = tl.exp(part_high - higher)
        weights = weights * shrink + tl.load(part_weights + place) * part
        sums = sums * shrink + tl.load(part_sums + place * HEAD_DIM + dims, mask=mask, other=0.0) * part
        highest = higher
    found = tl.where(weights > 0, sums / tl.where(weights > 0, weights, 1.0), 0.0)
    tl.store(out + (sequence * HEADS + head) * HEAD_DIM + dims, found.to(out.dtype.element_ty), mask=mask)


@triton.jit
def chunk_kernel(
    query,
    key_cache,
    value_cache,
    block_tables,
    seq_lens,
    query_starts,  # [sequences + 1]
    tile_sequences,  # [tiles]
    tile_offsets,  # [tiles] first token of each tile in its sequence's chunk
    out,  # [T, heads, HEAD_DIM]
    scale,
    query_token_stride,
    query_head_stride,
    table_stride,
    WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile, KV head): ROWS // GROUP_ROWS tokens of a chunk with each head of that KV head.

    `GROUP_ROWS` is the power of two that holds `GROUP`. A row's numbers do not depend on where its chunk begins.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    sequence = tl.load(tile_sequences + tile).to(tl.int64)
    offset = tl.load(tile_offsets + tile)
    chunk_start = tl.load(query_starts + sequence)
    chunk_len = tl.load(query_starts + sequence + 1) - chunk_start
    length = tl.load(seq_lens + sequence)
    numbers = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    group = numbers % GROUP_ROWS
    tokens = offset + numbers // GROUP_ROWS
    heads = kv_head * GROUP + group
    exists = (tokens < chunk_len) & (group < GROUP)
    positions = length - chunk_len + tokens
    seen_from = tl.maximum(positions - WINDOW + 1, 0) if WINDOW > 0 else positions * 0
    begin = tl.maximum(length - chunk_len + offset - WINDOW + 1, 0) // KEYS * KEYS if WINDOW > 0 else offset * 0
    end = tl.minimum(length - chunk_len + offset + ROWS // GROUP_ROWS, length)
    packed = (chunk_start + tokens).to(tl.int64)
    mask = exists[:, None] & (dims < HEAD_DIM)[None, :]
    rows = tl.load(
        query + packed[:, None] * query_token_stride + heads[:, None] * query_head_stride + dims[None, :],
        mask=mask,
        other=0.0,
    )
    sums, weights, _ = _attend(
        rows,
        seen_from,
        positions,
        begin,
        end,
        block_tables + sequence * table_stride,
        key_cache,
        value_cache,
        kv_head,
        scale,
        BLOCK_SIZE,
        KV_HEADS,
        HEAD_DIM,
        ROWS,
        DIM,
        KEYS,
        PRECISION,
    )
    found = sums / tl.where(weights > 0, weights, 1.0)[:, None]
    places = (packed[:, None] * (KV_HEADS * GROUP) + heads[:, None]) * HEAD_DIM + dims[None, :]
    tl.store(out + places, found.to(out.dtype.element_ty), mask=mask)
