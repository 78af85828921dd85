"""Counts of work against the parameters of a real model."""

from __future__ import annotations

from pathlib import Path

from server.model.config import load_model_config
from server.model.costs import backbone_weights, prefill_flops, step_weights
from server.model.layers.linear import Linear
from tests.model.twins import load


def test_weights_are_those_of_the_models_matrices(tiny_checkpoint: Path) -> None:
    model, config = load(tiny_checkpoint), load_model_config(tiny_checkpoint)
    matrices = sum(module.weight.numel() for module in model.text.modules() if isinstance(module, Linear))
    assert backbone_weights(config) == matrices
    assert model.lm_head is not None
    assert step_weights(config) == matrices + model.lm_head.weight.numel()


def test_a_prompt_costs_its_products_and_a_triangle_of_attention(tiny_checkpoint: Path) -> None:
    config = load_model_config(tiny_checkpoint)
    text = config.text
    pairs = sum(range(1, 11))
    attention = pairs * text.num_layers * text.num_heads * text.head_dim * 2 * 2  # scores and sums, a product and a sum
    head = 2 * text.vocab_size * text.hidden_size
    assert prefill_flops(config, 10) == 10 * 2 * backbone_weights(config) + attention + head
