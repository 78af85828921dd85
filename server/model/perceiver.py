"""From the vision tower to the language model: a projection to its width, then a resampler to 64 rows a tile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from server.model.config import ModelConfig, PerceiverConfig
from server.model.layers.linear import GatedMLP, KVLinear, Linear
from server.model.layers.norm import RMSNorm
from server.model.parts import Parts, run_to_end

# At the published sizes so many rows take about as long as a layer of the vision tower over the largest tile. The
# projection's inner width is twelve times its input's, so this bounds its memory too.
PROJECTED_ROWS = 1024


class PerceiverAttention(nn.Module):
    """Latents attend to the picture and to themselves; grouped heads, no positions."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = Linear(config.hidden_size, config.num_heads * config.head_dim)
        self.kv = KVLinear(config.hidden_size, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim)
        self.out = Linear(config.num_heads * config.head_dim, config.hidden_size)

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        """Latents [N, L, hidden], context [N, P, hidden] → [N, L, hidden]."""
        query = self.q(latents).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [N, heads, L, head_dim]
        # Joined after the projection: its rows are much narrower than the hidden ones.
        pairs = torch.cat((self.kv(context), self.kv(latents)), dim=1)  # [N, P + L, 2 kv_heads, head_dim]
        key, value = pairs.transpose(1, 2).chunk(2, dim=1)  # each [N, kv_heads, P + L, head_dim]
        attended = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        out: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return out


class PerceiverLayer(nn.Module):
    """Attention and a gated MLP around residuals of the latents; the context stays as it is."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.latents_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.context_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = PerceiverAttention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, 4 * config.hidden_size, config.hidden_size)

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        """Latents [N, L, hidden], context [N, P, hidden] → latents [N, L, hidden]."""
        latents = latents + self.attention(self.latents_norm(latents), self.context_norm(context))
        out: Tensor = latents + self.mlp(self.mlp_norm(latents))
        return out


class PerceiverResampler(nn.Module):
    """Learned latents that read the picture `depth` times."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(config.num_latents, config.hidden_size), requires_grad=False)
        self.layers = nn.ModuleList(PerceiverLayer(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def parts(self, context: Tensor) -> Parts:
        """[N, P, hidden] → [N, num_latents, hidden], with a pause after each layer."""
        latents = self.latents.expand(context.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(latents, context)
            yield
        normed: Tensor = self.norm(latents)
        return normed


class Connector(nn.Module):
    """Modality projection, then resampler."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.projection = GatedMLP(config.vision.hidden_size, config.text.intermediate_size, config.text.hidden_size)
        self.resampler = PerceiverResampler(config.perceiver)

    def forward(self, vision: Tensor) -> Tensor:
        """[N, P, vision hidden] → [N, num_latents, text hidden]."""
        return run_to_end(self.parts(vision))

    def parts(self, vision: Tensor) -> Parts:
        """`forward`, which pauses after each layer of the resampler and each `PROJECTED_ROWS` rows before."""
        projected = []
        for rows in torch.split(vision, PROJECTED_ROWS, dim=1):
            projected.append(self.projection(rows))
            yield
        return (yield from self.resampler.parts(torch.cat(projected, dim=1)))

    def num_parts(self, num_patches: int) -> int:
        """How often `parts` pauses."""
        return -(-num_patches // PROJECTED_ROWS) + len(self.resampler.layers)
