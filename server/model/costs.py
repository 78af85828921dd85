"""How much work the shapes of a model make: what a measured time is held against. Counts, in bytes and operations."""

from __future__ import annotations

from server.model.config import ModelConfig


def backbone_weights(config: ModelConfig) -> int:
    """Numbers in the matrices that every token of text is multiplied with, the head's not among them."""
    text = config.text
    heads = (2 * text.num_heads + 2 * text.num_kv_heads) * text.head_dim * text.hidden_size
    return text.num_layers * (heads + 3 * text.hidden_size * text.intermediate_size)


def step_weights(config: ModelConfig) -> int:
    """Numbers that a step of decodes reads once, however many there are: the backbone's and the head's."""
    return backbone_weights(config) + config.text.vocab_size * config.text.hidden_size


def prefill_flops(config: ModelConfig, num_tokens: int) -> int:
    """Operations of a prompt that is computed whole: products with weights, causal attention, one row of logits."""
    text = config.text
    attention = 2 * num_tokens * (num_tokens + 1) * text.num_layers * text.num_heads * text.head_dim
    return 2 * num_tokens * backbone_weights(config) + attention + 2 * text.vocab_size * text.hidden_size
