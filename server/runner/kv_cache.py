"""The KV cache's tensors: two per layer, block by block. Who holds which block is the engine's business."""

from __future__ import annotations

import torch

from server.model.attention.base import LayerCache
from server.model.config import ModelConfig


def block_bytes(config: ModelConfig, *, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers, keys and values."""
    return 2 * config.text.num_layers * block_size * config.text.num_kv_heads * config.text.head_dim * dtype.itemsize


def allocate_kv_cache(
    config: ModelConfig, *, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
) -> list[LayerCache]:
    """One LayerCache a layer, each tensor [num_blocks, block_size, kv_heads, head_dim].

    Zeroed, because a gathered block's unused tail is multiplied by a weight of 0, and 0 × NaN is NaN.
    """
    shape = (num_blocks, block_size, config.text.num_kv_heads, config.text.head_dim)
    return [
        LayerCache(
            key=torch.zeros(shape, device=device, dtype=dtype),
            value=torch.zeros(shape, device=device, dtype=dtype),
        )
        for _ in range(config.text.num_layers)
    ]
