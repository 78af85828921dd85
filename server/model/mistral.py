"""The language model: Mistral over T packed tokens of any sequences. Which sequences, only the attention knows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from server.model.attention.base import AttentionBackend, AttentionMetadata, LayerCache
from server.model.config import TextConfig
from server.model.layers.embedding import Embedding
from server.model.layers.linear import GatedMLP, Linear, QKVLinear
from server.model.layers.norm import RMSNorm
from server.model.layers.rotary import Rotary, rotate


class MistralAttention(nn.Module):
    """Grouped-query attention with rotary positions over a paged cache."""

    def __init__(self, config: TextConfig, attention: AttentionBackend) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.qkv = QKVLinear(
            config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
        )
        self.out = Linear(config.num_heads * config.head_dim, config.hidden_size)
        self.attention = attention

    def forward(
        self, hidden: Tensor, angles: tuple[Tensor, Tensor], *, cache: LayerCache, metadata: AttentionMetadata
    ) -> Tensor:
        """[T, hidden] → [T, hidden]."""
        heads: Tensor = self.qkv(hidden)  # [T, heads + 2 kv_heads, head_dim]
        turned = rotate(heads[:, : -self.num_kv_heads], *angles)  # queries and keys at once
        query, key = turned[:, : self.num_heads], turned[:, self.num_heads :]
        value = heads[:, -self.num_kv_heads :]
        attended = self.attention.forward(query, key, value, cache, metadata)  # [T, heads, head_dim]
        out: Tensor = self.out(attended.flatten(1))
        return out


class MistralLayer(nn.Module):
    """Attention, then a gated MLP, each after an RMSNorm and around a residual."""

    def __init__(self, config: TextConfig, attention: AttentionBackend) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = MistralAttention(config, attention)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_size)

    def forward(
        self, hidden: Tensor, angles: tuple[Tensor, Tensor], *, cache: LayerCache, metadata: AttentionMetadata
    ) -> Tensor:
        """[T, hidden] → [T, hidden]."""
        hidden = hidden + self.attention(self.attention_norm(hidden), angles, cache=cache, metadata=metadata)
        out: Tensor = hidden + self.mlp(self.mlp_norm(hidden))
        return out


class MistralModel(nn.Module):
    """Token embedding, layers, and a last RMSNorm."""

    def __init__(self, config: TextConfig, attention: AttentionBackend) -> None:
        super().__init__()
        self.embedding = Embedding(config.vocab_size, config.hidden_size)
        self.rotary = Rotary(
            head_dim=config.head_dim, max_positions=config.max_position_embeddings, theta=config.rope_theta
        )
        self.layers = nn.ModuleList(MistralLayer(config, attention) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, positions: Tensor, caches: Sequence[LayerCache], metadata: AttentionMetadata
    ) -> Tensor:
        """Embeddings [T, hidden] at positions [T] → [T, hidden], normed; layer i reads and writes caches[i]."""
        angles = self.rotary(positions, hidden.dtype)
        for layer, cache in zip(self.layers, caches, strict=True):
            hidden = layer(hidden, angles, cache=cache, metadata=metadata)
        normed: Tensor = self.norm(hidden)
        return normed
