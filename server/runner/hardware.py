"""What the settings come to on this machine: its device, the type of its numbers and the width of its weights."""

from __future__ import annotations

import logging

import torch

from server.config import ServerConfig
from server.errors import ConfigError
from server.model.layers.packed import Quantization, has_narrow_weights
from server.runner.decode_graphs import cuda_recorder
from server.runner.model_runner import ModelRunner

logger = logging.getLogger(__name__)


def choose_device(name: str, index: int = 0) -> torch.device:
    """The device by config, on CUDA the one with that index; ConfigError when it is asked for and missing."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, and PyTorch finds no CUDA device")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if index >= count:
        raise ConfigError(f"data_parallel_size: {index + 1} engines need as many CUDA devices, and there are {count}")
    return torch.device("cuda", index)


def set_threads(config: ServerConfig) -> None:
    """CPU threads of one engine: as many as were asked for, or its share of the cores."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    elif config.data_parallel_size > 1:
        torch.set_num_threads(max(torch.get_num_threads() // config.data_parallel_size, 1))


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, float32 elsewhere, or what was asked for."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return torch.bfloat16 if has_bf16 else torch.float32


def choose_quantization(config: ServerConfig, device: torch.device) -> Quantization:
    """What was asked for; else half-width weights where nothing was, and the CPU would emulate 16-bit arithmetic."""
    if config.quantization != "auto":
        return config.quantization
    emulates = device.type == "cpu" and choose_dtype("auto", device) == torch.float32
    return "fp16" if emulates and config.dtype == "auto" and has_narrow_weights() else "none"


def record_decodes(runner: ModelRunner, *, max_num_seqs: int, max_model_len: int) -> None:
    """Have a CUDA device replay steps of decodes, where its attention allows; a failure leaves them as they were."""
    if not runner.can_record_decodes:
        return
    try:
        runner.record_decodes(cuda_recorder(), max_num_seqs=max_num_seqs, max_model_len=max_model_len)
    except RuntimeError as error:
        logger.warning("decodes are not recorded: %s", next(iter(str(error).splitlines()), type(error).__name__))
