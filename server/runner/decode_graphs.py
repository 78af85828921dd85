"""Steps of decodes alone, recorded once for each of a few batch sizes and replayed: one launch instead of hundreds.

A recorded computation reads and writes the same memory each time. So each size has one buffer of numbers for the whole
step, filled by one copy, and sequences that are not there are decodes of no tokens, which store nothing.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from server.model.attention.base import AttentionMetadata
from server.runner.input_batch import InputBatch
from server.runner.transfer import upload

NO_SLOT = -1


class Decoded(NamedTuple):
    """What a step of B decodes computes: hidden states [B, hidden] and float32 logits [B, vocab]."""

    hidden: Tensor
    logits: Tensor


class DecodeInputs:
    """Views of one int32 buffer on the device: all that a step of `size` decodes needs to know."""

    def __init__(self, size: int, max_blocks: int, device: torch.device) -> None:
        self.size = size
        self.max_blocks = max_blocks
        self._buffer = torch.zeros((4 + max_blocks) * size, dtype=torch.int32, device=device)
        rows = self._buffer[: 4 * size].view(4, size)
        self.token_ids, self.positions, self.slot_mapping, self.seq_lens = rows
        self.block_tables = self._buffer[4 * size :].view(size, max_blocks)

    def fill(self, batch: InputBatch, block_size: int) -> None:
        """Take in a batch of decodes. Whatever is recorded runs after this, in order."""
        count = len(batch.seq_lens)
        values = np.zeros((4 + self.max_blocks) * self.size, dtype=np.int32)
        token_ids, positions, slots, seq_lens = values[: 4 * self.size].reshape(4, self.size)
        tables = values[4 * self.size :].reshape(self.size, self.max_blocks)
        token_ids[:count] = batch.token_ids.numpy()
        positions[:count] = batch.positions.numpy()
        seq_lens[:count] = batch.seq_lens
        slots[count:] = NO_SLOT
        for row, (table, seq_len) in enumerate(zip(batch.block_tables, batch.seq_lens, strict=True)):
            used = table[: -(-seq_len // block_size)]
            tables[row, : len(used)] = used
            slots[row] = used[-1] * block_size + (seq_len - 1) % block_size
        self._buffer.copy_(upload(torch.from_numpy(values), self._buffer.device), non_blocking=True)


# Records a computation: what replays it, and what it returned, which each replay writes anew.
Recorder = Callable[[Callable[[], Decoded]], tuple[Callable[[], None], Decoded]]


@runtime_checkable
class DecodeAttention(Protocol):
    """An attention backend whose decodes read all that changes from the device."""

    def decode_metadata(
        self, *, slot_mapping: Tensor, block_tables: Tensor, seq_lens: Tensor, max_context: int
    ) -> AttentionMetadata: ...


@dataclass(frozen=True)
class _Recorded:
    inputs: DecodeInputs
    replay: Callable[[], None]
    decoded: Decoded


class DecodeGraphs:
    """One recording a batch size; a batch runs in the smallest that holds it."""

    def __init__(
        self,
        compute: Callable[[DecodeInputs, AttentionMetadata], Decoded],
        attention: DecodeAttention,
        record: Recorder,
        *,
        sizes: Sequence[int],
        block_size: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self._sizes = sorted(sizes)
        self._block_size = block_size
        max_blocks = -(-max_model_len // block_size)
        self._recorded: dict[int, _Recorded] = {}
        for size in reversed(self._sizes):  # the others then find the memory that the largest took
            inputs = DecodeInputs(size, max_blocks, device)
            inputs.slot_mapping.fill_(NO_SLOT)
            metadata = attention.decode_metadata(
                slot_mapping=inputs.slot_mapping,
                block_tables=inputs.block_tables,
                seq_lens=inputs.seq_lens,
                max_context=max_model_len,
            )
            replay, decoded = record(functools.partial(compute, inputs, metadata))
            self._recorded[size] = _Recorded(inputs, replay, decoded)

    def fits(self, batch: InputBatch) -> bool:
        """Whether a batch is of decodes alone, few enough, and none of them of a picture's row."""
        is_decodes = len(batch.token_ids) == len(batch.seq_lens) == len(batch.sampled)
        return is_decodes and not batch.image_rows.numel() and len(batch.seq_lens) <= self._sizes[-1]

    def run(self, batch: InputBatch) -> Decoded:
        """Compute a batch that fits. What comes back is overwritten by the next one."""
        count = len(batch.seq_lens)
        recorded = self._recorded[self._sizes[bisect_left(self._sizes, count)]]
        recorded.inputs.fill(batch, self._block_size)
        recorded.replay()
        return Decoded(recorded.decoded.hidden[:count], recorded.decoded.logits[:count])


def graph_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, then every eighth up to `max_num_seqs`, itself included."""
    sizes = {size for size in (1, 2, 4, *range(8, max_num_seqs + 1, 8)) if size < max_num_seqs}
    return sorted({*sizes, max_num_seqs})


def cuda_recorder() -> Recorder:
    """Records CUDA graphs, all of them over one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def record(compute: Callable[[], Decoded]) -> tuple[Callable[[], None], Decoded]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()  # kernels are compiled and libraries find their workspaces outside of the recording
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            decoded = compute()
        return graph.replay, decoded

    return record
