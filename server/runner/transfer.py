"""Numbers on their way from host lists to a device, without waiting for what it still computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`. From pageable memory, CUDA would first finish all that it was asked for before."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def indices(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 [n] on `device`; none makes an empty tensor of integers too."""
    return upload(torch.tensor(values, dtype=torch.int64), device)


def numbers(values: Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """[n] in `dtype` on `device`."""
    return upload(torch.tensor(values, dtype=dtype), device)
