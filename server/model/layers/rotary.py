"""Rotary position embedding: angles tabulated once, and the rotation of heads by them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Cosines and sines of every position, in float32.

    Dimensions i and i + head_dim/2 of a head make a pair that turns by position * theta^(-2i/head_dim) (the layout of
    GPT-NeoX). The sine's first half is stored negated, so that a rotation is one product and one fused
    multiply-add with the halves exchanged.
    """

    table: Tensor  # [max_positions, 2, head_dim]: cosine, signed sine

    def __init__(self, *, head_dim: int, max_positions: int, theta: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.max_positions = max_positions
        self.theta = theta
        self.register_buffer("table", None, persistent=False)
        self.fill_buffers(torch.device("cpu"))

    def fill_buffers(self, device: torch.device) -> None:
        """Compute the table anew on the CPU, whose rounding is the reference's, and put it on `device`."""
        exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device="cpu") / self.head_dim
        frequencies = 1.0 / self.theta**exponents  # [head_dim/2]
        positions = torch.arange(self.max_positions, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, frequencies)  # [max_positions, head_dim/2]
        cos, sin = angles.cos(), angles.sin()
        self.table = torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)), dim=1).to(device)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Positions [T] → cosine and signed sine, each [T, 1, head_dim] in `dtype`, for all layers of a step."""
        cos, sin = self.table[positions].to(dtype).unsqueeze(2).unbind(1)
        return cos, sin


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads [T, any number, head_dim] by the angles that `Rotary` gave for their T positions."""
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, dims=-1), sin)
