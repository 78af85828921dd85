from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch

from server.model.config import load_model_config
from server.model.weight_map import checkpoint_shapes, weight_spread, weight_targets
from tests.model.twins import Pair


def test_names_and_shapes_are_the_references(pair: Pair) -> None:
    expected = {name: tuple(weight.shape) for name, weight in pair.reference.named_parameters()}
    assert checkpoint_shapes(pair.ours.config) == expected


def test_every_parameter_is_filled_exactly_once(pair: Pair) -> None:
    filled: dict[str, int] = defaultdict(int)
    for target in weight_targets(pair.ours.config).values():
        filled[target.parameter] += torch.Size(target.shape).numel()
    assert filled == {name: parameter.numel() for name, parameter in pair.ours.named_parameters()}


def test_order_is_fixed(tiny_checkpoint: Path) -> None:
    config = load_model_config(tiny_checkpoint)
    assert list(checkpoint_shapes(config)) == list(checkpoint_shapes(config))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.text_model.layers.0.mlp.down_proj.weight", (128, 256), (0.0, 1 / 16)),
        ("model.vision_model.embeddings.patch_embedding.weight", (64, 3, 14, 14), (0.0, 588**-0.5)),
        ("model.vision_model.embeddings.position_embedding.weight", (4900, 64), (0.0, 0.5)),
        ("model.text_model.embed_tokens.weight", (32003, 128), (0.0, 0.05)),
        ("model.connector.perceiver_resampler.latents", (64, 128), (0.0, 1.0)),
        ("model.text_model.norm.weight", (128,), (1.0, 0.1)),
        ("model.vision_model.encoder.layers.0.mlp.fc1.bias", (128,), (0.0, 0.1)),
    ],
)
def test_spread(name: str, shape: tuple[int, ...], expected: tuple[float, float]) -> None:
    assert weight_spread(name, shape) == expected
