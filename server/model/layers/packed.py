"""Weight matrices laid out once as a CPU's matrix library wants them, instead of anew in every product.

`F.linear` over a plain matrix is the twin of every class here. Which of them serves is `choose_packing`'s to say;
`Linear` holds the result and knows no more of it than that it can be called.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from server.errors import ConfigError

Quantization = Literal["none", "fp16", "int8"]
PackedWeight = Callable[[Tensor], Tensor]  # [..., in_features] → [..., out_features], bias included

_LIBRARY = "fbgemm"  # PyTorch's own library for 16 and 8 bits on x86-64
_ROW_LEVELS = 127  # an activation in 8 bits: -127 to 127 around 128
_SMALLEST = 1e-30  # keeps the scale of a row of zeros from dividing by zero


@dataclass(frozen=True)
class Packing:
    """A way to store weights. `matrix_dtype` is what a matrix is held in between the checkpoint and `pack`."""

    name: str
    matrix_dtype: torch.dtype
    pack: Callable[[Tensor, Tensor | None], PackedWeight]


class OneDnnWeight:
    """Reordered for oneDNN; the numbers stay as they are.

    The library else reorders a matrix in every call that has more than a few rows, and leaves one row to a routine
    that reads memory at half its speed.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out


class HalfWeight:
    """Weights in float16, products and sums in float32: half the memory to read, on CPUs that compute in neither.

    Of a bfloat16 checkpoint nothing is lost but digits of weights below 2^-14, which keep an absolute 2^-25.
    Nobody trains weights beyond float16's 65,504.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), _float(bias))

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), self._packed)
        return out.to(x.dtype)


class Int8Weight:
    """Weights and activations in 8 bits: one scale an output feature, and one a row of activations, found as it comes.

    A row's numbers thus follow from that row alone, whoever shares its batch. Without VNNI instructions the library
    adds two products of bytes in 16 bits, which would overflow; there weights keep to 7 bits.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        levels = 127 if torch.cpu.get_capabilities().get("avx512_vnni") else 63
        rows = weight.float()
        scales = rows.abs().amax(dim=1).clamp_(min=_SMALLEST) / levels
        torch.backends.quantized.engine = _LIBRARY
        with warnings.catch_warnings():  # PyTorch moves the making of quantised tensors elsewhere; the products stay
            warnings.filterwarnings("ignore", message=".*quantize", category=UserWarning)
            quantized = torch.quantize_per_channel(
                rows, scales, torch.zeros_like(scales, dtype=torch.int64), 0, torch.qint8
            )
            self._packed = torch.ops.quantized.linear_prepack(quantized, None)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        values = x.float()
        scale = values.abs().amax(dim=-1, keepdim=True).clamp_(min=_SMALLEST)
        product: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            values / scale, 1 / _ROW_LEVELS, 128, self._packed
        )
        product *= scale
        if self._bias is not None:
            product += self._bias
        return product.to(x.dtype)


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


def choose_packing(quantization: Quantization, device: torch.device, dtype: torch.dtype) -> Packing | None:
    """How to store the matrices of a model that computes in `dtype` on `device`; None: as they are.

    Raises ConfigError for a quantisation that this machine has no library for.
    """
    has_library = device.type == "cpu" and has_narrow_weights()
    if quantization != "none" and not has_library:
        raise ConfigError(
            f"quantization: {quantization} needs a CPU with x86-64's {_LIBRARY}, and runs on {device.type}"
        )
    if quantization == "int8":
        return Packing("int8", torch.float16, Int8Weight)
    if quantization == "fp16":
        return Packing("fp16", torch.float16, HalfWeight)
    if device.type != "cpu":
        return None
    if multiplies(dtype):
        return Packing(str(dtype).removeprefix("torch."), dtype, OneDnnWeight)
    # A CPU without instructions for a 16-bit type emulates it, ten times slower than float32.
    return Packing("fp16", torch.float16, HalfWeight) if has_library else None


def has_narrow_weights() -> bool:
    """Whether this build of PyTorch multiplies weights of 16 and 8 bits on the CPU, as it does on x86-64."""
    return _LIBRARY in torch.backends.quantized.supported_engines


def multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has matrix products of its own for `dtype` on this CPU."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.float32:
        return True
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype in supported and bool(supported[dtype]())
