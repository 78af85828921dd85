"""Every backend against a dense softmax in float64. Kernels for CUDA run through Triton's interpreter."""

from __future__ import annotations

import random

import pytest
import torch

from server.model.attention.base import LayerCache
from tests.model.attention.pages import CPU, dense, pages

pytestmark = [
    pytest.mark.parametrize("kind", ["sdpa", "triton"]),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # Triton's interpreter
]

HEADS = [(4, 4), (6, 2), (5, 1)]
WINDOWS = [None, 1, 3, 7, 100]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_a_whole_prompt(kind: str, heads: int, kv_heads: int, window: int | None) -> None:
    for length in (2, 7, 8, 17):
        store = pages(kind, heads=heads, kv_heads=kv_heads)
        store.check([store.sequence(length, length)], window)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_decodes_of_different_lengths(kind: str, heads: int, kv_heads: int, window: int | None) -> None:
    store = pages(kind, heads=heads, kv_heads=kv_heads)
    store.check([store.sequence(length, 1) for length in (1, 3, 4, 5, 8, 21)], window)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("length", "query_len"), [(9, 2), (9, 8), (16, 8), (17, 5), (6, 5), (30, 3)])
def test_a_chunk_behind_a_cached_context(kind: str, length: int, query_len: int, window: int | None) -> None:
    store = pages(kind)
    store.check([store.sequence(length, query_len)], window)


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
@pytest.mark.parametrize("window", [None, 5])
def test_a_mixed_batch_in_scattered_blocks(kind: str, block_size: int, window: int | None) -> None:
    for seed in range(4):
        rng = random.Random(seed)
        store = pages(kind, seed, block_size=block_size)
        decodes = [store.sequence(rng.randint(1, 12), 1) for _ in range(rng.randint(0, 3))]
        chunks = []
        for _ in range(rng.randint(0 if decodes else 1, 3)):
            length = rng.randint(2, 12)
            chunks.append(store.sequence(length, rng.randint(2, length)))
        store.check([*decodes, *chunks], window)


def test_a_window_as_long_as_the_context_hides_nothing(kind: str) -> None:
    for window in (9, 10):
        store = pages(kind)
        store.check([store.sequence(9, 1), store.sequence(9, 4), store.sequence(9, 9)], window)


def test_a_shared_prefix_is_read_by_both(kind: str) -> None:
    store = pages(kind)
    first = store.sequence(10, 1)
    second = store.sequence(10, 2)
    for block in range(2):  # the first two blocks are one and the same
        second.blocks[block] = first.blocks[block]
        second.keys[block * 4 : block * 4 + 4] = first.keys[block * 4 : block * 4 + 4]
        second.values[block * 4 : block * 4 + 4] = first.values[block * 4 : block * 4 + 4]
    store.check([first, second], None)


def test_block_tables_may_hold_more_blocks_than_are_full(kind: str) -> None:
    """A request's table runs ahead of its chunk when blocks for later tokens are taken already."""
    store = pages(kind)
    sequences = [store.sequence(5, 1), store.sequence(9, 4)]
    for sequence in sequences:
        sequence.blocks += [store.free.pop(), store.free.pop()]
    store.check(sequences, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(kind: str, dtype: torch.dtype) -> None:
    if kind == "triton" and dtype == torch.bfloat16:
        dtype = torch.float16  # the interpreter of Triton 3.9 multiplies the bits of bfloat16 as if they were integers
    store = pages(kind)
    sequences = [store.sequence(11, 1), store.sequence(11, 4), store.sequence(5, 5)]
    backend = store.backend(6)
    cache = LayerCache(*(tensor.to(dtype) for tensor in store.cache))
    metadata = backend.build_metadata(
        query_lens=[1, 4, 5],
        seq_lens=[11, 11, 5],
        block_tables=[sequence.blocks for sequence in sequences],
        block_size=4,
        device=CPU,
        dtype=dtype,
    )
    out = backend.forward(
        torch.cat([sequence.query for sequence in sequences]).to(dtype),
        torch.cat([sequence.keys[-sequence.query_len :] for sequence in sequences]).to(dtype),
        torch.cat([sequence.values[-sequence.query_len :] for sequence in sequences]).to(dtype),
        cache,
        metadata,
    )
    assert out.dtype == dtype
    expected = torch.cat([dense(sequence, 6) for sequence in sequences])
    torch.testing.assert_close(out.double(), expected, atol=3e-2, rtol=3e-2)
