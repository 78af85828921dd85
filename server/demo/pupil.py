"""The demo model while it learns: the serving modules, plain attention over whole sequences, and heads for letters."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from server.demo.curriculum import Batch, TileGroup
from server.demo.examples import (
    GLYPHS_A_CELL,
    GLYPHS_A_PATCH,
    IGNORED,
    NO_GLYPH,
    NO_MARK,
    NO_WORD,
    WORDS_A_CELL,
)
from server.model.attention.base import AttentionBackend, LayerCache
from server.model.config import ModelConfig
from server.model.idefics2 import Idefics2Model
from server.model.layers.norm import RMSNorm

# Of the class "nothing here" in a loss, as most places show nothing.
EMPTY_WEIGHT = 0.2


class WholeSequences(AttentionBackend):
    """Causal attention within each of the sequences, which have one length, without a cache: what training needs."""

    def build_metadata(self, *, seq_lens: Sequence[int], **_: Any) -> int:
        """How many sequences there are."""
        return len(seq_lens)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, cache: LayerCache, metadata: int) -> Tensor:
        query, key, value = (t.view(metadata, -1, *t.shape[1:]).transpose(1, 2) for t in (query, key, value))
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


def _fused_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    """As the module, but rounded once: a third of the time."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)


class Losses(NamedTuple):
    """Of answers' tokens, and the share of these that are likeliest; of letters in patches; of letters, words and
    shapes in the cells of a grid."""

    answers: Tensor
    right: Tensor
    patches: Tensor
    cells: Tensor
    words: Tensor
    marks: Tensor


class Pupil(nn.Module):
    """The model in training: itself, and heads which are thrown away later.

    One says which letters a patch shows; the others, which letters, words and shapes stand in the cell of a grid that a
    row of the connector is given to look after. Thus the tower learns its letters, and the connector to keep their
    places and to spell, from a small part of the pictures that it takes through the answers alone. Words are told by
    their tokens' embeddings, so that a word in a picture looks to the language model like the same word in a question.
    """

    def __init__(self, config: ModelConfig, word_tokens: Tensor) -> None:
        """`word_tokens` [words of the lexicon]: the token that each is."""
        super().__init__()
        self.attention = WholeSequences()
        self.model = Idefics2Model(config, self.attention)
        hidden = config.text.hidden_size
        self.patch_head = nn.Linear(config.vision.hidden_size, GLYPHS_A_PATCH * (NO_GLYPH + 1))
        self.cell_head = nn.Linear(hidden, GLYPHS_A_CELL * (NO_GLYPH + 1))
        self.mark_head = nn.Linear(hidden, NO_MARK + 1)
        self.word_head = nn.Linear(hidden, WORDS_A_CELL * hidden)
        self.no_word_head = nn.Linear(hidden, WORDS_A_CELL)
        self.register_buffer("word_tokens", word_tokens, persistent=False)
        self.model.requires_grad_(True)
        for module in self.model.modules():
            if isinstance(module, RMSNorm):
                module.forward = functools.partial(_fused_norm, module)  # type: ignore[method-assign]
        self._no_caches = cast("Sequence[LayerCache]", [None] * config.text.num_layers)

    word_tokens: Tensor

    def forward(self, batch: Batch, vocabulary: Tensor | None = None) -> Losses:
        """`vocabulary` [V], ascending: the tokens among which the right one is to be found; None: all.

        Only the batch's learners have gradients; losses that are theirs not are 0.
        """
        nothing = torch.zeros((), device=batch.token_ids.device)
        groups = batch.groups
        seen = [self._look(group) for group in groups]
        rows = [self.model.connector(features) for features in seen]
        patches, cells, words, marks = [nothing] * 4
        if groups:
            given = torch.cat([row.flatten(0, 1) for row in rows])
            patch_logits = torch.cat([self.patch_head(features).flatten() for features in seen])
            patches = _told(patch_logits, [group.patches for group in groups], NO_GLYPH)
            cells = _told(self.cell_head(given), [group.cells for group in groups], NO_GLYPH)
            words = _told(self._spell(given), [group.words for group in groups], NO_WORD)
            marks = _told(self.mark_head(given), [group.marks for group in groups], NO_MARK)
        letters = Losses(nothing, nothing, patches, cells, words, marks)
        if batch.learners == "eyes":
            return letters
        if batch.learners == "reader":
            letters = Losses(*(loss.detach() for loss in letters))
            rows = [row.detach() for row in rows]
        answers, right = self._answer(batch, rows, vocabulary)
        return letters._replace(answers=answers, right=right)

    def _spell(self, rows: Tensor) -> Tensor:
        """[R, hidden] → logits [R, 2, words of the lexicon + 1]."""
        slots = self.word_head(rows).unflatten(-1, (WORDS_A_CELL, -1))
        words = F.linear(slots, self.model.text.embedding.weight.index_select(0, self.word_tokens))
        return torch.cat((words, self.no_word_head(rows).unsqueeze(-1)), dim=-1)

    def _look(self, group: TileGroup) -> Tensor:
        model = self.model
        features: Tensor = model.vision(model.normalizer(group.tiles, model.text.embedding.weight.dtype))
        return features

    def _answer(self, batch: Batch, rows: Sequence[Tensor], vocabulary: Tensor | None) -> tuple[Tensor, Tensor]:
        """Their loss, and the share of right tokens."""
        model, ids = self.model, batch.token_ids
        table: Tensor = model.text.embedding.weight
        embedded = table.index_select(0, ids.flatten())  # the gradient of `embed` waits for the device
        for group, given in zip(batch.groups, rows, strict=True):
            embedded = model.merge(embedded, given.flatten(0, 1), group.positions)
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids))
        hidden = model(
            embedded, positions, self._no_caches, self.attention.build_metadata(seq_lens=[ids.shape[1]] * len(ids))
        )
        right = batch.answers
        if vocabulary is not None:
            table, right = table.index_select(0, vocabulary), torch.searchsorted(vocabulary, right)
        logits = F.linear(hidden.index_select(0, batch.asked), table).float()
        return F.cross_entropy(logits, right), (logits.argmax(-1) == right).float().mean()


def _told(logits: Tensor, labels: Sequence[Tensor], empty: int) -> Tensor:
    """The loss of logits, `empty` + 1 for each of the labels, in their order."""
    weight = torch.ones(empty + 1, device=logits.device)
    weight[empty] = EMPTY_WEIGHT
    right = torch.cat([label.flatten() for label in labels]).long()
    loss = F.cross_entropy(logits.float().view(-1, empty + 1), right, weight, ignore_index=IGNORED, reduction="sum")
    # Not torch's mean: where all labels are ignored it is not a number.
    return loss / (weight[right.clamp(min=0)] * (right != IGNORED)).sum().clamp(min=1)


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
