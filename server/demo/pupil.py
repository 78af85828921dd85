"""The demo model while it learns: the serving modules, plain attention over whole sequences, and a head for letters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from server.demo.curriculum import Batch, TileGroup
from server.demo.examples import GLYPHS_A_CELL, GLYPHS_A_PATCH, IGNORED, NUM_GLYPH_CLASSES
from server.model.attention.base import AttentionBackend, AttentionMetadata, LayerCache
from server.model.config import ModelConfig
from server.model.idefics2 import Idefics2Model
from server.model.layers.linear import GatedMLP
from server.model.layers.norm import RMSNorm


class WholeSequences(AttentionBackend):
    """Causal attention within each of the sequences, which have one length, without a cache: what training needs."""

    def build_metadata(self, *, seq_lens: Sequence[int], **_: Any) -> AttentionMetadata:
        nothing = torch.empty(0, dtype=torch.int64)
        return AttentionMetadata(nothing, nothing, query_starts=(), seq_lens=seq_lens, num_decodes=0, decode_mask=None)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, cache: LayerCache, metadata: AttentionMetadata
    ) -> Tensor:
        count = len(metadata.seq_lens)
        query, key, value = (t.view(count, -1, *t.shape[1:]).transpose(1, 2) for t in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return attended.transpose(1, 2).flatten(0, 1)


class PlainAttention(TorchFunctionMode):
    """Within it, attention is two products and a softmax: on a CPU the gradients of the fused kernel take ten times as
    long for sequences as short as these."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)


def _attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False, enable_gqa: bool = False) -> Tensor:
    """[N, heads, Q, d], [N, kv heads, K, d] twice → [N, heads, Q, d]."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if is_causal:
        scores = scores + torch.full(scores.shape[-2:], float("-inf"), dtype=scores.dtype).triu_(1)
    attended: Tensor = scores.softmax(-1) @ value
    return attended


class Losses(NamedTuple):
    """Of answers' tokens, and the share of these that are likeliest; of letters in patches, and in cells of a grid."""

    answers: Tensor
    right: Tensor
    patches: Tensor
    cells: Tensor


class Pupil(nn.Module):
    """The model in training: itself, and two heads which are thrown away later.

    One says which letters a patch shows, the other which letters stand in the cell of a grid that a row of the
    connector is given to look after. A few thousand pictures teach the tower its letters that way, and the connector
    to keep their places; through the answers alone it takes a million.
    """

    def __init__(self, config: ModelConfig, *, compiled: bool = False) -> None:
        super().__init__()
        self.attention = WholeSequences()
        self.model = Idefics2Model(config, self.attention)
        self.patch_head = nn.Linear(config.vision.hidden_size, GLYPHS_A_PATCH * NUM_GLYPH_CLASSES)
        self.cell_head = nn.Linear(config.text.hidden_size, GLYPHS_A_CELL * NUM_GLYPH_CLASSES)
        self.model.requires_grad_(True)
        # Fused, they are a third of a step faster. Whole layers would be compiled anew for every size of batch.
        for module in self.model.modules():
            if compiled and isinstance(module, (GatedMLP, RMSNorm, nn.LayerNorm)):
                module.compile(dynamic=True)
        self._no_caches = cast("Sequence[LayerCache]", [None] * config.text.num_layers)

    def forward(self, batch: Batch, vocabulary: Tensor) -> Losses:
        """`vocabulary` [V] are the tokens among which the right one is to be found.

        Only the batch's learners have gradients; losses that are theirs not are 0.
        """
        nothing = torch.zeros(())
        with torch.set_grad_enabled(batch.learners != "reader"):
            seen = [self._look(group) for group in batch.groups]
            rows = [self.model.connector(features) for features in seen]
            patches = _letters_loss(self.patch_head, seen, [group.glyphs for group in batch.groups])
            cells = _letters_loss(self.cell_head, rows, [group.cells for group in batch.groups])
        if batch.learners == "eyes":
            return Losses(nothing, nothing, patches, cells)
        return Losses(*self._answer(batch, rows, vocabulary), patches, cells)

    def _look(self, group: TileGroup) -> Tensor:
        model = self.model
        features: Tensor = model.vision(
            model.normalizer(torch.from_numpy(group.tiles), model.text.embedding.weight.dtype)
        )
        return features

    def _answer(self, batch: Batch, rows: Sequence[Tensor], vocabulary: Tensor) -> tuple[Tensor, Tensor]:
        """Their loss, and the share of right tokens."""
        model = self.model
        ids = torch.from_numpy(batch.token_ids)
        embedded = model.embed(ids.flatten())
        for group, given in zip(batch.groups, rows, strict=True):
            embedded = model.merge(embedded, given.flatten(0, 1), torch.from_numpy(group.positions))
        positions = torch.arange(ids.shape[1]).repeat(len(ids))
        hidden = model(
            embedded, positions, self._no_caches, self.attention.build_metadata(seq_lens=[ids.shape[1]] * len(ids))
        )
        labels = torch.from_numpy(batch.labels)
        asked = (labels[:, 1:] != IGNORED).flatten().nonzero().squeeze(1)
        states = hidden.unflatten(0, ids.shape)[:, :-1].flatten(0, 1)[asked]
        logits = F.linear(states, model.text.embedding.weight[vocabulary]).float()
        right = torch.searchsorted(vocabulary, labels[:, 1:].flatten()[asked])
        return F.cross_entropy(logits, right), (logits.argmax(-1) == right).float().mean()


def _letters_loss(head: nn.Module, features: Sequence[Tensor], labels: Sequence[npt.NDArray[np.int64]]) -> Tensor:
    """`features` [N, places, hidden] and `labels` [N, places, letters] of each group."""
    logits = torch.cat([head(seen).float().view(-1, NUM_GLYPH_CLASSES) for seen in features])
    return F.cross_entropy(logits, torch.cat([torch.from_numpy(right).flatten() for right in labels]))


def initialize(pupil: Pupil, seed: int) -> None:
    """Matrices by fan-in, latents from a unit normal, norms 1, biases 0: wider, and the loss never leaves the prior."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in pupil.named_parameters():
        if name.endswith("latents"):
            parameter.data.normal_(0, 1, generator=generator)
        elif name.endswith("embedding.weight"):
            parameter.data.normal_(0, 0.05, generator=generator)
        elif "position" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
        elif parameter.ndim > 1:
            parameter.data.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
