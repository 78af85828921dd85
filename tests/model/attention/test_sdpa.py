"""Paged attention against a dense softmax in float64 that knows nothing of pages."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from server.model.attention.base import AttentionMetadata, LayerCache
from server.model.attention.sdpa import SdpaAttention

CPU = torch.device("cpu")
DIM = 8


@dataclass
class Context:
    """A context of known keys and values, of which the last `query_len` tokens are new in this step."""

    query: Tensor  # [query_len, heads, DIM]
    keys: Tensor  # [length, kv_heads, DIM]
    values: Tensor
    blocks: list[int]

    @property
    def length(self) -> int:
        return len(self.keys)

    @property
    def query_len(self) -> int:
        return len(self.query)


def dense(sequence: Context, window: int | None) -> Tensor:
    """[query_len, heads, DIM], one query and one head at a time."""
    query_len, heads, _ = sequence.query.shape
    group = heads // sequence.keys.shape[1]
    out = torch.empty(sequence.query.shape, dtype=torch.float64)
    for row in range(query_len):
        position = sequence.length - query_len + row
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(heads):
            keys = sequence.keys[first : position + 1, head // group].double()
            values = sequence.values[first : position + 1, head // group].double()
            weights = torch.softmax(keys @ sequence.query[row, head].double() / math.sqrt(DIM), dim=-1)
            out[row, head] = weights @ values
    return out


class Pages:
    """A cache with its blocks handed out in random order; free places hold what a careless gather would show."""

    def __init__(self, rng: random.Random, *, num_blocks: int, block_size: int, heads: int, kv_heads: int) -> None:
        self.block_size, self.heads, self.kv_heads = block_size, heads, kv_heads
        self.generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
        self.free = list(range(num_blocks))
        rng.shuffle(self.free)
        shape = (num_blocks, block_size, kv_heads, DIM)
        self.cache = LayerCache(torch.full(shape, 50.0), torch.full(shape, 1e4))

    def random(self, length: int, heads: int) -> Tensor:
        return torch.randn(length, heads, DIM, generator=self.generator)

    def sequence(self, length: int, query_len: int) -> Context:
        """A sequence whose tokens before the new ones are in the cache already."""
        blocks = [self.free.pop() for _ in range(-(-length // self.block_size))]
        keys, values = self.random(length, self.kv_heads), self.random(length, self.kv_heads)
        for position in range(length - query_len):
            block, offset = blocks[position // self.block_size], position % self.block_size
            self.cache.key[block, offset] = keys[position]
            self.cache.value[block, offset] = values[position]
        return Context(self.random(query_len, self.heads), keys, values, blocks)

    def metadata(self, backend: SdpaAttention, sequences: list[Context]) -> AttentionMetadata:
        return backend.build_metadata(
            query_lens=[sequence.query_len for sequence in sequences],
            seq_lens=[sequence.length for sequence in sequences],
            block_tables=[sequence.blocks for sequence in sequences],
            block_size=self.block_size,
            device=CPU,
            dtype=torch.float32,
        )

    def check(self, sequences: list[Context], window: int | None) -> None:
        """Run a step of these sequences, compare each with its dense twin, and the cache with what was stored."""
        backend = SdpaAttention(sliding_window=window)
        before = [tensor.clone() for tensor in self.cache]
        out = backend.forward(
            torch.cat([sequence.query for sequence in sequences]),
            torch.cat([sequence.keys[-sequence.query_len :] for sequence in sequences]),
            torch.cat([sequence.values[-sequence.query_len :] for sequence in sequences]),
            self.cache,
            self.metadata(backend, sequences),
        )
        start = 0
        for sequence in sequences:
            got = out[start : start + sequence.query_len].double()
            torch.testing.assert_close(got, dense(sequence, window), atol=1e-5, rtol=1e-5)
            start += sequence.query_len
        assert start == len(out)
        for tensor, old, name in zip(self.cache, before, ("keys", "values"), strict=True):
            for sequence in sequences:
                stored = tensor[sequence.blocks].flatten(0, 1)
                assert torch.equal(stored[: sequence.length], getattr(sequence, name))
                past = old[sequence.blocks].flatten(0, 1)[sequence.length :]
                assert torch.equal(stored[sequence.length :], past), "written beyond the sequence"
            assert torch.equal(tensor[self.free], old[self.free]), "written to a block of nobody"


def pages(seed: int = 0, *, block_size: int = 4, heads: int = 6, kv_heads: int = 2) -> Pages:
    return Pages(random.Random(seed), num_blocks=128, block_size=block_size, heads=heads, kv_heads=kv_heads)


HEADS = [(4, 4), (6, 2), (5, 1)]
WINDOWS = [None, 1, 3, 7, 100]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_a_whole_prompt(heads: int, kv_heads: int, window: int | None) -> None:
    for length in (2, 7, 8, 17):
        store = pages(heads=heads, kv_heads=kv_heads)
        store.check([store.sequence(length, length)], window)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_decodes_of_different_lengths(heads: int, kv_heads: int, window: int | None) -> None:
    store = pages(heads=heads, kv_heads=kv_heads)
    store.check([store.sequence(length, 1) for length in (1, 3, 4, 5, 8, 21)], window)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("length", "query_len"), [(9, 2), (9, 8), (16, 8), (17, 5), (6, 5), (30, 3)])
def test_a_chunk_behind_a_cached_context(length: int, query_len: int, window: int | None) -> None:
    store = pages()
    store.check([store.sequence(length, query_len)], window)


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
@pytest.mark.parametrize("window", [None, 5])
def test_a_mixed_batch_in_scattered_blocks(block_size: int, window: int | None) -> None:
    for seed in range(4):
        rng = random.Random(seed)
        store = pages(seed, block_size=block_size)
        decodes = [store.sequence(rng.randint(1, 12), 1) for _ in range(rng.randint(0, 3))]
        chunks = []
        for _ in range(rng.randint(0 if decodes else 1, 3)):
            length = rng.randint(2, 12)
            chunks.append(store.sequence(length, rng.randint(2, length)))
        store.check([*decodes, *chunks], window)


def test_a_window_as_long_as_the_context_hides_nothing() -> None:
    for window in (9, 10):
        store = pages()
        store.check([store.sequence(9, 1), store.sequence(9, 4), store.sequence(9, 9)], window)


def test_a_shared_prefix_is_read_by_both() -> None:
    store = pages()
    first = store.sequence(10, 1)
    second = store.sequence(10, 2)
    for block in range(2):  # the first two blocks are one and the same
        second.blocks[block] = first.blocks[block]
        second.keys[block * 4 : block * 4 + 4] = first.keys[block * 4 : block * 4 + 4]
        second.values[block * 4 : block * 4 + 4] = first.values[block * 4 : block * 4 + 4]
    store.check([first, second], None)


def test_block_tables_may_hold_more_blocks_than_are_full() -> None:
    """A request's table runs ahead of its chunk when blocks for later tokens are taken already."""
    store = pages()
    sequences = [store.sequence(5, 1), store.sequence(9, 4)]
    for sequence in sequences:
        sequence.blocks += [store.free.pop(), store.free.pop()]
    store.check(sequences, None)


def test_metadata_names_the_slot_of_each_new_token() -> None:
    metadata = SdpaAttention(sliding_window=None).build_metadata(
        query_lens=[1, 3],
        seq_lens=[6, 5],
        block_tables=[[9, 2], [4, 7]],
        block_size=4,
        device=CPU,
        dtype=torch.float32,
    )
    assert metadata.slot_mapping.tolist() == [2 * 4 + 1, 4 * 4 + 2, 4 * 4 + 3, 7 * 4]
    assert list(metadata.query_starts) == [0, 1, 4]
    assert list(metadata.seq_lens) == [6, 5]
    assert metadata.num_decodes == 1
    assert metadata.decode_mask is not None
    assert metadata.decode_mask.shape == (1, 1, 1, 8)
    assert metadata.block_tables.tolist() == [[9, 2], [4, 7]]


def test_a_step_of_prompts_alone_needs_no_mask() -> None:
    store = pages()
    metadata = store.metadata(SdpaAttention(sliding_window=None), [store.sequence(5, 5)])
    assert metadata.num_decodes == 0
    assert metadata.decode_mask is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype: torch.dtype) -> None:
    store = pages()
    sequences = [store.sequence(11, 1), store.sequence(11, 4), store.sequence(5, 5)]
    backend = SdpaAttention(sliding_window=6)
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
