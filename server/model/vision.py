"""The vision tower: SigLIP over the patches of a picture of any size.

Tiles of one call have one size, so nothing is padded and nothing is masked. Knows nothing about where tiles come from.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from server.model.config import VisionConfig
from server.model.layers.embedding import Embedding
from server.model.layers.linear import Linear, QKVLinear
from server.model.parts import Parts, run_to_end


def position_buckets(table_side: int) -> Tensor:
    """Where the patches of a side with n patches fall on a side of the position table, for every n.

    Returns [table_side + 1, table_side] int64; row n holds n buckets, then zeros. This is the formula of the code the
    weights were trained with (Idefics2 in transformers 4.40): float32 coordinates on the CPU, whose step 1/n is
    itself rounded to float32. Where i/n meets a boundary exactly, rounding decides the bucket, so later rewritings
    of it disagree at some n (5.23 at 49 and 58 of 1..70).
    """
    boundaries = torch.arange(1 / table_side, 1.0, 1 / table_side, device="cpu")
    table = torch.zeros(table_side + 1, table_side, dtype=torch.int64, device="cpu")
    for n in range(1, table_side + 1):
        step = (1 / torch.tensor(n, device="cpu")).item()
        coordinates = torch.arange(0, 1 - 1e-6, step, device="cpu")
        table[n, :n] = torch.bucketize(coordinates, boundaries, right=True)
    return table


class PatchEmbedding(nn.Module):
    """Cut a picture into patches, project each, and add the embedding of its place.

    A convolution whose stride is its kernel size is a product over flattened patches; the product is several times
    faster on a CPU.
    """

    buckets: Tensor  # [side + 1, side], see position_buckets

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.side = config.patches_per_side
        self.projection = Linear(3 * config.patch_size**2, config.hidden_size, bias=True)
        self.position = Embedding(self.side**2, config.hidden_size)
        self.register_buffer("buckets", None, persistent=False)
        self.fill_buffers(torch.device("cpu"))

    def fill_buffers(self, device: torch.device) -> None:
        """Compute the table of buckets anew and put it on `device`."""
        self.buckets = position_buckets(self.side).to(device)

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] → [N, H//p * W//p, hidden], row by row; pixels right of and below the last patch are dropped.

        Raises ValueError when a side has no whole patch, or more patches than the position table.
        """
        n, _, height, width = pixels.shape
        p = self.patch_size
        rows, columns = height // p, width // p
        if not (1 <= rows <= self.side and 1 <= columns <= self.side):
            raise ValueError(f"a tile must have 1 to {self.side} patches of {p} pixels a side, got {height}×{width}")
        patches = (
            pixels[:, :, : rows * p, : columns * p]
            .reshape(n, 3, rows, p, columns, p)
            .permute(0, 2, 4, 1, 3, 5)  # [N, rows, columns, 3, p, p]: the order of the convolution's kernel
            .reshape(n, rows * columns, 3 * p * p)
        )
        positions = self.buckets[rows, :rows, None] * self.side + self.buckets[columns, None, :columns]
        embedded: Tensor = self.projection(patches) + self.position(positions.flatten())
        return embedded


class VisionAttention(nn.Module):
    """Every patch attends to every patch of its tile."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = QKVLinear(
            config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_heads,
            head_dim=config.head_dim,
            bias=True,
        )
        self.out = Linear(config.hidden_size, config.hidden_size, bias=True)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, P, hidden] → [N, P, hidden]."""
        query, key, value = self.qkv(hidden).transpose(1, 2).chunk(3, dim=1)  # each [N, heads, P, head_dim]
        attended = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out


class VisionLayer(nn.Module):
    """Attention, then an MLP with tanh-approximated GELU, each after a LayerNorm and around a residual."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = VisionAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.up = Linear(config.hidden_size, config.intermediate_size, bias=True)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=True)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, P, hidden] → [N, P, hidden]."""
        hidden = hidden + self.attention(self.attention_norm(hidden))
        inner = F.gelu(self.up(self.mlp_norm(hidden)), approximate="tanh")
        out: Tensor = hidden + self.down(inner)
        return out


class VisionTower(nn.Module):
    """Patches, layers, and a last LayerNorm."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patches = PatchEmbedding(config)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [N, 3, H, W] in the model's type → [N, H//patch * W//patch, hidden]."""
        return run_to_end(self.parts(pixels))

    def parts(self, pixels: Tensor) -> Parts:
        """`forward`, which pauses after each layer."""
        hidden: Tensor = self.patches(pixels)
        for layer in self.layers:
            hidden = layer(hidden)
            yield
        normed: Tensor = self.norm(hidden)
        return normed
