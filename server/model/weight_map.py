"""The names of a checkpoint's tensors, and where each goes in our model. No other file spells such a name.

The published layout, the same in transformers 4 and 5: `model.vision_model.…`, `model.connector.…`,
`model.text_model.…` and `lm_head.weight`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from server.model.config import ModelConfig

LM_HEAD = "lm_head.weight"
TEXT_PREFIX = "model.text_model."
EMBEDDING = TEXT_PREFIX + "embed_tokens.weight"


class WeightTarget(NamedTuple):
    """Where a checkpoint tensor goes.

    parameter: its name in Idefics2Model
    shard: the part of a fused layer that the tensor fills, None for the whole parameter
    shape: the tensor's shape in the checkpoint; the parameter may hold the same elements flattened
    """

    parameter: str
    shard: str | None
    shape: tuple[int, ...]


Entries = Iterator[tuple[str, WeightTarget]]


def weight_targets(config: ModelConfig) -> dict[str, WeightTarget]:
    """Every tensor that a checkpoint of this config has, by its name there.

    With tied embeddings there is none for the head: should a file hold `lm_head.weight` nevertheless, it is the
    embedding once more.
    """
    return dict((*_vision(config), *_connector(config), *_text(config)))


def checkpoint_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint, in a fixed order."""
    return {name: target.shape for name, target in weight_targets(config).items()}


def num_parameters(config: ModelConfig) -> int:
    """How many numbers a checkpoint of this config holds."""
    return sum(math.prod(shape) for shape in checkpoint_shapes(config).values())


def weight_spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation that random weights for a tensor are drawn with.

    Matrices are scaled by fan-in, so that a signal keeps its size from layer to layer; latents, positions, biases and
    norms differ among themselves. A model filled like this depends on every pixel, word, position and weight, and a
    mistake in any of them shows in its output.
    """
    if name.endswith("latents"):
        return 0.0, 1.0
    if "position_embedding" in name:
        return 0.0, 0.5
    if "embed_tokens" in name:
        return 0.0, 0.05
    if len(shape) == 1:
        return (0.0, 0.1) if name.endswith("bias") else (1.0, 0.1)
    fan_in = 1
    for size in shape[1:]:
        fan_in *= size
    return 0.0, fan_in**-0.5


def _matrix(
    name: str, parameter: str, shape: tuple[int, ...], *, shard: str | None = None, bias: bool = False
) -> Entries:
    """A linear layer: `name.weight` of `shape`, and `name.bias` with its rows."""
    yield f"{name}.weight", WeightTarget(f"{parameter}.weight", shard, shape)
    if bias:
        yield f"{name}.bias", WeightTarget(f"{parameter}.bias", shard, shape[:1])


def _norm(name: str, parameter: str, size: int, *, bias: bool = False) -> Entries:
    yield f"{name}.weight", WeightTarget(f"{parameter}.weight", None, (size,))
    if bias:
        yield f"{name}.bias", WeightTarget(f"{parameter}.bias", None, (size,))


def _gated_mlp(name: str, parameter: str, sizes: tuple[int, int, int]) -> Entries:
    """A gated MLP of sizes (in, intermediate, out)."""
    inside, intermediate, outside = sizes
    yield from _matrix(f"{name}.gate_proj", f"{parameter}.gate_up", (intermediate, inside), shard="gate")
    yield from _matrix(f"{name}.up_proj", f"{parameter}.gate_up", (intermediate, inside), shard="up")
    yield from _matrix(f"{name}.down_proj", f"{parameter}.down", (outside, intermediate))


def _vision(config: ModelConfig) -> Entries:
    vision = config.vision
    hidden, mlp, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    source, target = "model.vision_model", "vision"
    embeddings = f"{source}.embeddings"
    yield from _matrix(
        f"{embeddings}.patch_embedding", f"{target}.patches.projection", (hidden, 3, patch, patch), bias=True
    )
    yield from _matrix(
        f"{embeddings}.position_embedding", f"{target}.patches.position", (vision.patches_per_side**2, hidden)
    )
    for index in range(vision.num_layers):
        name, parameter = f"{source}.encoder.layers.{index}", f"{target}.layers.{index}"
        yield from _norm(f"{name}.layer_norm1", f"{parameter}.attention_norm", hidden, bias=True)
        for shard in "qkv":
            yield from _matrix(
                f"{name}.self_attn.{shard}_proj", f"{parameter}.attention.qkv", (hidden, hidden), shard=shard, bias=True
            )
        yield from _matrix(f"{name}.self_attn.out_proj", f"{parameter}.attention.out", (hidden, hidden), bias=True)
        yield from _norm(f"{name}.layer_norm2", f"{parameter}.mlp_norm", hidden, bias=True)
        yield from _matrix(f"{name}.mlp.fc1", f"{parameter}.up", (mlp, hidden), bias=True)
        yield from _matrix(f"{name}.mlp.fc2", f"{parameter}.down", (hidden, mlp), bias=True)
    yield from _norm(f"{source}.post_layernorm", f"{target}.norm", hidden, bias=True)


def _connector(config: ModelConfig) -> Entries:
    perceiver, text = config.perceiver, config.text
    hidden = perceiver.hidden_size
    query = perceiver.num_heads * perceiver.head_dim
    pair = perceiver.num_kv_heads * perceiver.head_dim
    yield from _gated_mlp(
        "model.connector.modality_projection",
        "connector.projection",
        (config.vision.hidden_size, text.intermediate_size, text.hidden_size),
    )
    source, target = "model.connector.perceiver_resampler", "connector.resampler"
    yield f"{source}.latents", WeightTarget(f"{target}.latents", None, (perceiver.num_latents, hidden))
    for index in range(perceiver.depth):
        name, parameter = f"{source}.layers.{index}", f"{target}.layers.{index}"
        yield from _norm(f"{name}.input_latents_norm", f"{parameter}.latents_norm", hidden)
        yield from _norm(f"{name}.input_context_norm", f"{parameter}.context_norm", hidden)
        yield from _matrix(f"{name}.self_attn.q_proj", f"{parameter}.attention.q", (query, hidden))
        for shard in "kv":
            yield from _matrix(
                f"{name}.self_attn.{shard}_proj", f"{parameter}.attention.kv", (pair, hidden), shard=shard
            )
        yield from _matrix(f"{name}.self_attn.o_proj", f"{parameter}.attention.out", (hidden, query))
        yield from _norm(f"{name}.post_attention_layernorm", f"{parameter}.mlp_norm", hidden)
        yield from _gated_mlp(f"{name}.mlp", f"{parameter}.mlp", (hidden, 4 * hidden, hidden))
    yield from _norm(f"{source}.norm", f"{target}.norm", hidden)


def _text(config: ModelConfig) -> Entries:
    text = config.text
    hidden = text.hidden_size
    rows = {"q": text.num_heads * text.head_dim, "k": text.num_kv_heads * text.head_dim}
    rows["v"] = rows["k"]
    source, target = TEXT_PREFIX.rstrip("."), "text"
    yield from _matrix(f"{source}.embed_tokens", f"{target}.embedding", (text.vocab_size, hidden))
    for index in range(text.num_layers):
        name, parameter = f"{source}.layers.{index}", f"{target}.layers.{index}"
        yield from _norm(f"{name}.input_layernorm", f"{parameter}.attention_norm", hidden)
        for shard, size in rows.items():
            yield from _matrix(
                f"{name}.self_attn.{shard}_proj", f"{parameter}.attention.qkv", (size, hidden), shard=shard
            )
        yield from _matrix(f"{name}.self_attn.o_proj", f"{parameter}.attention.out", (hidden, rows["q"]))
        yield from _norm(f"{name}.post_attention_layernorm", f"{parameter}.mlp_norm", hidden)
        yield from _gated_mlp(f"{name}.mlp", f"{parameter}.mlp", (hidden, text.intermediate_size, hidden))
    yield from _norm(f"{source}.norm", f"{target}.norm", hidden)
    if not config.tie_word_embeddings:
        yield LM_HEAD, WeightTarget("lm_head.weight", None, (text.vocab_size, hidden))
