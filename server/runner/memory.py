"""How much memory the KV cache gets, and so how many blocks and how long a context fit."""

from __future__ import annotations

from collections.abc import Callable

import torch

from server.errors import ConfigError

DEFAULT_CPU_KV_GIB = 4.0
GIB = 1 << 30


def kv_budget_bytes(
    *,
    device: torch.device,
    requested_gib: float | None,
    gpu_memory_utilization: float,
    run_largest_step: Callable[[], None],
) -> int:
    """Bytes for the KV cache: as requested, else what a GPU has left after its largest step, else 4 GiB on CPU.

    `run_largest_step` computes the biggest batch and the biggest pictures once, so that their peak is known.
    """
    if requested_gib is not None:
        return int(requested_gib * GIB)
    if device.type != "cuda":
        return int(DEFAULT_CPU_KV_GIB * GIB)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    run_largest_step()
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    cached_now = torch.cuda.memory_reserved(device)
    peak = torch.cuda.max_memory_reserved(device)
    used_by_others = total - free - cached_now
    torch.cuda.empty_cache()
    budget = int(total * gpu_memory_utilization) - used_by_others - peak
    if budget <= 0:
        raise ConfigError(
            f"gpu_memory_utilization {gpu_memory_utilization} of {total / GIB:.1f} GiB leaves nothing for the KV "
            f"cache: the model and its largest step take {peak / GIB:.1f} GiB, others {used_by_others / GIB:.1f} GiB"
        )
    return budget


def choose_context(
    *,
    budget_bytes: int,
    block_bytes: int,
    block_size: int,
    max_num_seqs: int,
    requested_len: int | None,
    model_len: int,
) -> tuple[int, int]:
    """(num_blocks, max_model_len) for a memory budget.

    Never more blocks than `max_num_seqs` full contexts could use. A context that was asked for and does not fit is a
    ConfigError; one that was not is shortened to what fits.
    """
    if requested_len is not None and requested_len > model_len:
        raise ConfigError(f"max_model_len {requested_len} is more than the model's {model_len} positions")
    num_blocks = budget_bytes // block_bytes
    capacity = num_blocks * block_size
    max_model_len = requested_len or min(model_len, capacity)
    if capacity < max_model_len or max_model_len < 1:
        needed = -(-max_model_len // block_size) * block_bytes
        raise ConfigError(
            f"max_model_len {max_model_len} needs {needed / GIB:.2f} GiB of KV cache, and {budget_bytes / GIB:.2f} GiB "
            "are there: lower max_model_len or raise kv_cache_memory_gb or gpu_memory_utilization"
        )
    useful = max_num_seqs * -(-max_model_len // block_size)
    return min(num_blocks, useful), max_model_len
