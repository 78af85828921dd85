"""From a step's plan to tensors: the packed tokens, where image rows go, and which rows' logits are wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.engine.step import NewRequest, ScheduledRequest

if TYPE_CHECKING:
    from server.grammar.matcher import Matcher


@dataclass(slots=True)
class RequestState:
    """What the runner keeps of a request between steps: its tokens, its block table, its place in a grammar.

    `bitmask` are the tokens that the grammar lets follow now, as int32 words [ceil(vocab / 32)].
    """

    source: NewRequest
    token_ids: list[int]
    block_ids: list[int] = field(default_factory=list)
    matcher: Matcher | None = None
    bitmask: NDArray[np.int32] | None = None

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.source.prompt_token_ids)


@dataclass(frozen=True)
class InputBatch:
    """T tokens of B requests, packed in order; all of it on the host.

    token_ids, positions   [T] int64
    image_positions        [R] int64: which of the T embeddings are rows of a picture
    image_rows             [R] int64: which rows of the flattened slab [slots * rows, hidden] they are
    logits_indices         [S] int64: last tokens of the requests in `sampled`
    """

    token_ids: Tensor
    positions: Tensor
    image_positions: Tensor
    image_rows: Tensor
    logits_indices: Tensor
    sampled: list[RequestState]
    query_lens: list[int]
    seq_lens: list[int]
    block_tables: list[list[int]]


def build_input_batch(
    scheduled: Sequence[ScheduledRequest],
    states: Mapping[str, RequestState],
    *,
    rows_per_tile: int,
) -> InputBatch:
    """Pack the scheduled chunks. A request is sampled when its chunk reaches its last token."""
    token_ids: list[int] = []
    positions: list[int] = []
    image_positions: list[int] = []
    image_rows: list[int] = []
    logits_indices: list[int] = []
    sampled: list[RequestState] = []
    for item in scheduled:
        state = states[item.request_id]
        start, end = item.num_computed_tokens, item.num_computed_tokens + item.num_tokens
        base = len(token_ids) - start  # packed index of position p is base + p
        token_ids += state.token_ids[start:end]
        positions += range(start, end)
        for index, slot in item.tile_slots.items():
            placeholder = state.source.placeholders[index]
            first, last = max(placeholder.offset, start), min(placeholder.end, end)
            image_positions += range(base + first, base + last)
            row = slot * rows_per_tile - placeholder.offset
            image_rows += range(row + first, row + last)
        if end == len(state.token_ids):
            logits_indices.append(len(token_ids) - 1)
            sampled.append(state)

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    return InputBatch(
        token_ids=tensor(token_ids),
        positions=tensor(positions),
        image_positions=tensor(image_positions),
        image_rows=tensor(image_rows),
        logits_indices=tensor(logits_indices),
        sampled=sampled,
        query_lens=[item.num_tokens for item in scheduled],
        seq_lens=[item.num_computed_tokens + item.num_tokens for item in scheduled],
        block_tables=[states[item.request_id].block_ids for item in scheduled],
    )
