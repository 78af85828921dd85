"""Matrix products with weights: the one place that knows how a weight matrix is stored.

Projections that read the same input are one matrix with named row ranges, so that they cost one product. The loader
asks a layer for the rows of a name; nobody else needs them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from server.model.layers.packed import PackedWeight, Packing


class Linear(nn.Module):
    """`x W^T + b` with weight [out_features, in_features], uninitialised until the loader fills it."""

    weight: nn.Parameter  # gone once it is packed
    bias: nn.Parameter | None
    packed: PackedWeight | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.packed = None

    def pack(self, packing: Packing) -> None:
        """Keep the weight as `packing` stores it, and let go of the plain one. Once only, after it was filled."""
        if self.packed is not None:
            raise ValueError("the weight is packed already")
        self.packed = packing.pack(self.weight, self.bias)
        del self.weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features]."""
        if self.packed is not None:
            return self.packed(x)
        return F.linear(x, self.weight, self.bias)


class FusedLinear(Linear):
    """Several projections of one input. `shards` gives their names and output sizes in the order of their rows."""

    def __init__(self, in_features: int, shards: Mapping[str, int], *, bias: bool = False) -> None:
        super().__init__(in_features, sum(shards.values()), bias=bias)
        self._rows: dict[str, slice] = {}
        start = 0
        for name, size in shards.items():
            self._rows[name] = slice(start, start + size)
            start += size

    def shard_rows(self, name: str) -> slice:
        """The rows of weight and bias that belong to projection `name`. Raises KeyError for another name."""
        return self._rows[name]


class QKVLinear(FusedLinear):
    """Queries, keys and values of one input, in shards "q", "k" and "v"."""

    def __init__(
        self, in_features: int, *, num_heads: int, num_kv_heads: int, head_dim: int, bias: bool = False
    ) -> None:
        sizes = {"q": num_heads * head_dim, "k": num_kv_heads * head_dim, "v": num_kv_heads * head_dim}
        super().__init__(in_features, sizes, bias=bias)
        self.head_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] → [..., num_heads + 2 num_kv_heads, head_dim]: all q heads, then k, then v."""
        return super().forward(x).view(*x.shape[:-1], -1, self.head_dim)


class KVLinear(FusedLinear):
    """Keys and values of one input, in shards "k" and "v"."""

    def __init__(self, in_features: int, *, num_kv_heads: int, head_dim: int) -> None:
        super().__init__(in_features, {"k": num_kv_heads * head_dim, "v": num_kv_heads * head_dim})
        self.head_dim = head_dim

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] → [..., 2 num_kv_heads, head_dim]: all k heads, then v."""
        return super().forward(x).view(*x.shape[:-1], -1, self.head_dim)


class GateUpLinear(FusedLinear):
    """The two inner projections of a gated MLP, in shards "gate" and "up"."""

    def __init__(self, in_features: int, intermediate_size: int) -> None:
        super().__init__(in_features, {"gate": intermediate_size, "up": intermediate_size})


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases: the MLP of backbone, projection and resampler."""

    def __init__(self, in_features: int, intermediate_size: int, out_features: int) -> None:
        super().__init__()
        self.gate_up = GateUpLinear(in_features, intermediate_size)
        self.down = Linear(intermediate_size, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out
