"""The plain attention that the model is tested with, and a model loaded around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from server.model.attention.base import LayerCache
from server.model.attention.sdpa import SdpaMetadata
from server.model.config import ModelConfig, load_model_config
from server.model.idefics2 import Idefics2Model
from server.model.loader import load_model


class ContiguousAttention:
    """One sequence whose position i lies in slot i. No window: test sequences are shorter than it."""

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
        return SdpaMetadata(
            slot_mapping=torch.arange(seq_lens[0] - query_lens[0], seq_lens[0], device=device),
            block_tables=torch.tensor(block_tables, device=device),
            query_starts=[0, query_lens[0]],
            seq_lens=seq_lens,
            num_decodes=0,
            decode_mask=None,
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, cache: LayerCache, metadata: SdpaMetadata) -> Tensor:
        end = metadata.seq_lens[0]
        keys, values = cache.key.flatten(0, 1), cache.value.flatten(0, 1)
        keys[metadata.slot_mapping] = key
        values[metadata.slot_mapping] = value
        visible = torch.arange(end) <= metadata.slot_mapping[:, None]  # [T, end]
        attended = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            keys[:end].transpose(0, 1)[None],
            values[:end].transpose(0, 1)[None],
            attn_mask=visible,
            enable_gqa=True,
        )
        return attended[0].transpose(0, 1)


def new_caches(config: ModelConfig, length: int, dtype: torch.dtype = torch.float32) -> list[LayerCache]:
    """Caches of one block of `length` slots; unwritten slots are NaN, so that reading one shows."""
    shape = (1, length, config.text.num_kv_heads, config.text.head_dim)
    return [
        LayerCache(torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype))
        for _ in range(config.text.num_layers)
    ]


def load(folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Idefics2Model:
    return load_model(
        folder,
        load_model_config(folder),
        attention=ContiguousAttention(),
        device=torch.device("cpu"),
        dtype=dtype,
        **options,
    )


@torch.inference_mode()
def run(model: Idefics2Model, embeddings: Tensor, chunks: Sequence[int] | None = None) -> Tensor:
    """Hidden states [T, hidden] of one sequence computed in chunks of the given lengths, by default at once."""
    caches = new_caches(model.config, len(embeddings), embeddings.dtype)
    outputs, start = [], 0
    for length in chunks or [len(embeddings)]:
        end = start + length
        metadata = ContiguousAttention().build_metadata(
            query_lens=[length],
            seq_lens=[end],
            block_tables=[[0]],
            block_size=len(embeddings),
            device=embeddings.device,
            dtype=embeddings.dtype,
        )
        outputs.append(model(embeddings[start:end], torch.arange(start, end), caches, metadata))
        start = end
    return torch.cat(outputs)


@dataclass(frozen=True)
class Pair:
    """Our model and transformers' own, from the same files."""

    ours: Idefics2Model
    reference: Any
