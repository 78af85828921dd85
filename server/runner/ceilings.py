"""What the hardware allows: how fast memory is read and copied, and matrices multiplied. Measured, not looked up."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

GIB = 1 << 30
REPEATS = 5
MATRIX_SIDE = 8192  # of the matrices that a GPU multiplies; a CPU gets an eighth


def read_bandwidth() -> float:
    """Bytes a second that all threads of the CPU read together: the best of five sums over a gibibyte."""
    data = torch.ones(GIB // torch.float32.itemsize)
    return GIB / _best(data.sum, torch.device("cpu"))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy within the device's memory reads and writes: the best of five of a gibibyte."""
    source = torch.ones(GIB // torch.float32.itemsize, device=device)
    target = torch.empty_like(source)
    return 2 * GIB / _best(lambda: target.copy_(source), device)


def matrix_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second in a product of two large square matrices: the best of five."""
    side = MATRIX_SIDE if device.type == "cuda" else MATRIX_SIDE // 8
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _best(lambda: left @ right, device)


def peak_gpu_bytes() -> int:
    """The most that PyTorch has held on the GPU at once since the last call; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def device_name() -> str:
    """The GPU's, or that there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest run of several, after one that does not count."""
    seconds = []
    for _ in range(1 + REPEATS):
        _finish(device)
        started = time.perf_counter()
        run()
        _finish(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
