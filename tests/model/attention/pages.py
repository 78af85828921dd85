"""Sequences in the pages of a cache, and a dense softmax in float64 that knows nothing of pages."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from server.model.attention.base import AttentionBackend, AttentionMetadata, LayerCache
from server.model.attention.sdpa import SdpaAttention
from server.model.attention.triton_paged import TritonAttention

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

    def __init__(
        self, rng: random.Random, *, kind: str, num_blocks: int, block_size: int, heads: int, kv_heads: int
    ) -> None:
        self.kind = kind
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

    def backend(self, window: int | None) -> AttentionBackend:
        if self.kind == "sdpa":
            return SdpaAttention(sliding_window=window)
        return TritonAttention(num_heads=self.heads, num_kv_heads=self.kv_heads, head_dim=DIM, sliding_window=window)

    def metadata(self, backend: AttentionBackend, sequences: list[Context]) -> AttentionMetadata:
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
        backend = self.backend(window)
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


def pages(kind: str, seed: int = 0, *, block_size: int = 4, heads: int = 6, kv_heads: int = 2) -> Pages:
    return Pages(random.Random(seed), kind=kind, num_blocks=128, block_size=block_size, heads=heads, kv_heads=kv_heads)
