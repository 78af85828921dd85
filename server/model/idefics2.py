"""Idefics2: vision tower, connector and language model, each usable by itself between the runner's steps.

For inference only: parameters take no gradient, and callers hold `torch.inference_mode`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from server.model.attention.base import AttentionBackend, AttentionMetadata, LayerCache
from server.model.config import ModelConfig, PixelNormalization
from server.model.layers.linear import Linear
from server.model.layers.packed import PackedWeight, Packing
from server.model.mistral import MistralModel
from server.model.parts import Parts, run_to_end
from server.model.perceiver import Connector
from server.model.vision import VisionTower


class PixelNormalizer(nn.Module):
    """Bytes to the numbers the tower was trained on: (byte * rescale_factor - mean) / std a channel, in float32."""

    scale: Tensor  # [3]
    shift: Tensor  # [3]

    def __init__(self, pixels: PixelNormalization) -> None:
        super().__init__()
        self.pixels = pixels
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)
        self.fill_buffers(torch.device("cpu"))

    def fill_buffers(self, device: torch.device) -> None:
        """Put one factor and one summand a channel on `device`."""
        std = torch.tensor(self.pixels.std, dtype=torch.float64, device="cpu")
        mean = torch.tensor(self.pixels.mean, dtype=torch.float64, device="cpu")
        self.scale = (self.pixels.rescale_factor / std).float().to(device)
        self.shift = (-mean / std).float().to(device)

    def forward(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 [N, H, W, 3] → [N, 3, H, W] in `dtype`, a view of channels-last memory."""
        return torch.addcmul(self.shift, pixels.float(), self.scale).to(dtype).permute(0, 3, 1, 2)


class Idefics2Model(nn.Module):
    """The whole model. `attention` is the backend that every layer of the language model calls."""

    lm_head: Linear | None  # None when the embedding serves as its weight

    def __init__(self, config: ModelConfig, attention: AttentionBackend) -> None:
        super().__init__()
        self.config = config
        self.normalizer = PixelNormalizer(config.pixels)
        self.vision = VisionTower(config.vision)
        self.connector = Connector(config)
        self.text = MistralModel(config.text, attention)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.text.hidden_size, config.text.vocab_size)
        self._packed_head: PackedWeight | None = None  # of the embedding, where it is the head
        self.requires_grad_(False)

    def pack(self, packing: Packing) -> None:
        """Keep every matrix as `packing` stores it, one after another. An embedding that is the head stays besides."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack(packing)
        if self.lm_head is None:
            self._packed_head = packing.pack(self.text.embedding.weight, None)

    def fill_buffers(self, device: torch.device) -> None:
        """Compute every buffer that no checkpoint holds, on `device`. Needed after the parameters have moved."""
        self.normalizer.fill_buffers(device)
        self.vision.patches.fill_buffers(device)
        self.text.rotary.fill_buffers(device)

    def encode_tiles(self, pixels: Tensor) -> Tensor:
        """Tiles of one size, uint8 [N, H, W, 3] on the model's device → rows [N, num_latents, hidden].

        Raises ValueError when a side has no whole patch or more patches than the position table.
        """
        return run_to_end(self.encode_in_parts(pixels))

    def encode_in_parts(self, pixels: Tensor) -> Parts:
        """`encode_tiles`, which pauses after each layer."""
        normalized = self.normalizer(pixels, self.text.embedding.weight.dtype)
        features = yield from self.vision.parts(normalized)
        return (yield from self.connector.parts(features))

    def num_encoding_parts(self, height: int, width: int) -> int:
        """How often `encode_in_parts` pauses for tiles of that size in pixels."""
        patch = self.config.vision.patch_size
        return len(self.vision.layers) + self.connector.num_parts((height // patch) * (width // patch))

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids [T] → [T, hidden]."""
        embedded: Tensor = self.text.embedding(token_ids)
        return embedded

    def merge(self, embeddings: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        """Write image rows [R, hidden] over embeddings [T, hidden] at positions [R], in place, and return them."""
        return embeddings.index_copy_(0, positions, rows)

    def forward(
        self, embeddings: Tensor, positions: Tensor, caches: Sequence[LayerCache], metadata: AttentionMetadata
    ) -> Tensor:
        """Embeddings [T, hidden] at positions [T] → last hidden states [T, hidden]."""
        hidden: Tensor = self.text(embeddings, positions, caches, metadata)
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states [B, hidden] → float32 logits [B, vocab_size]."""
        if self.lm_head is not None:
            logits: Tensor = self.lm_head(hidden)
        elif self._packed_head is not None:
            logits = self._packed_head(hidden)
        else:
            logits = F.linear(hidden, self.text.embedding.weight)
        return logits.float()
