"""Which attention serves: the kernels of ours where they run and agree with the plain twin, else the plain twin."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import Tensor

from server.errors import ConfigError
from server.model.attention.base import AttentionBackend, LayerCache
from server.model.attention.sdpa import SdpaAttention
from server.model.config import TextConfig

logger = logging.getLogger(__name__)

BackendName = Literal["auto", "sdpa", "triton"]

# Of a sequence in the check: (tokens in all, new tokens of them). Decodes first; both reach over several blocks, and
# one decode over several splits.
_SEQUENCES = ((700, 1), (33, 1), (90, 70), (40, 40))
_BLOCK_SIZE = 16
# Absolute for what is small and relative for what is large: a few units in the last place.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def choose_attention(
    name: BackendName, config: TextConfig, device: torch.device, dtype: torch.dtype
) -> AttentionBackend:
    """The backend by config. "auto" is Triton's on CUDA if it passes `check`, and SDPA elsewhere.

    Raises ConfigError when Triton is asked for and is not to be had.
    """
    plain = SdpaAttention(sliding_window=config.sliding_window)
    if name == "sdpa" or (name == "auto" and device.type != "cuda"):
        return plain
    try:
        # Not at the top: the library comes with PyTorch for CUDA, and is not needed elsewhere.
        from server.model.attention.triton_paged import TritonAttention

        kernels = TritonAttention(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            sliding_window=config.sliding_window,
        )
        check(kernels, plain, config, device, dtype)
    except Exception as error:
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        if name == "triton":
            raise ConfigError(f"attention_backend: triton does not work here: {reason}") from error
        logger.warning("attention through Triton does not work here, so PyTorch's is used: %s", reason)
        return plain
    return kernels


@torch.inference_mode()
def check(
    backend: AttentionBackend, plain: AttentionBackend, config: TextConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """Raise ArithmeticError unless a backend attends as the plain one does, to the rounding of `dtype`."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    tables: list[list[int]] = []
    for length, _ in _SEQUENCES:
        start = sum(map(len, tables))
        tables.append(list(range(start, start + -(-length // _BLOCK_SIZE))))
    num_tokens = sum(new for _, new in _SEQUENCES)
    cache_shape = (sum(map(len, tables)), _BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    stored = LayerCache(random(*cache_shape), random(*cache_shape))
    query = random(num_tokens, config.num_heads, config.head_dim)
    key, value = (random(num_tokens, config.num_kv_heads, config.head_dim) for _ in range(2))
    results = []
    for each in (backend, plain):
        cache = LayerCache(*(tensor.clone() for tensor in stored))
        metadata = each.build_metadata(
            query_lens=[new for _, new in _SEQUENCES],
            seq_lens=[length for length, _ in _SEQUENCES],
            block_tables=tables,
            block_size=_BLOCK_SIZE,
            device=device,
            dtype=dtype,
        )
        results.append((each.forward(query, key, value, cache, metadata), *cache))
    for name, ours, theirs in zip(("attention", "keys", "values"), *results, strict=True):
        differences = (ours.float() - theirs.float()).abs() / (1 + theirs.float().abs())
        difference = float(differences.max())
        if not difference <= _TOLERANCE[dtype]:
            raise ArithmeticError(f"{name} differ by {difference:.3g}, more than {_TOLERANCE[dtype]}")
