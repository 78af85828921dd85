from __future__ import annotations

import pytest
import torch

from tests.model.twins import Pair


@pytest.mark.parametrize("patches", [1, 729, 900])
def test_connector_equals_reference(pair: Pair, patches: int) -> None:
    config = pair.ours.config
    vision = torch.randn((2, patches, config.vision.hidden_size), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = pair.ours.connector(vision)
        expected = pair.reference.model.connector(vision, attention_mask=torch.ones(2, patches, dtype=torch.bool))
    assert ours.shape == (2, config.perceiver.num_latents, config.text.hidden_size)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


def test_tiles_of_a_batch_do_not_mix(pair: Pair) -> None:
    vision = torch.randn(3, 50, pair.ours.config.vision.hidden_size)
    with torch.inference_mode():
        together = pair.ours.connector(vision)
        alone = torch.cat([pair.ours.connector(tile[None]) for tile in vision])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
