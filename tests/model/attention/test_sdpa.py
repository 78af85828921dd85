"""What the plain backend makes of a step's lists."""

from __future__ import annotations

import torch

from server.model.attention.sdpa import SdpaAttention
from tests.model.attention.pages import CPU, pages


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
    store = pages("sdpa")
    metadata = store.metadata(SdpaAttention(sliding_window=None), [store.sequence(5, 5)])
    assert metadata.num_decodes == 0
    assert metadata.decode_mask is None
