from __future__ import annotations

import pytest
import torch
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings

from server.model.vision import position_buckets
from tests.model.twins import Pair

# Where float32 puts a coordinate that meets a boundary exactly one bucket below it, for a side of n patches.
ONE_BELOW = {
    25: [5, 10, 15, 20],
    49: [7, 14, 35, 42],
    50: [5, 10, 15, 20, 30, 40],
    55: [11, 22, 33, 44],
    58: [29],
}


def test_position_buckets_are_the_trained_formula_at_every_size() -> None:
    table = position_buckets(70)
    for n in range(1, 71):
        expected = [i * 70 // n - (i in ONE_BELOW.get(n, ())) for i in range(n)]
        assert table[n, :n].tolist() == expected, n
        assert not table[n, n:].any()
    # The formula itself, as it stood in the code that trained the model.
    boundaries = torch.arange(1 / 70, 1, 1 / 70)
    for n in range(1, 71):
        coordinates = torch.arange(0, 1 - 1e-6, 1 / torch.tensor(n))
        assert table[n, :n].tolist() == torch.bucketize(coordinates, boundaries, right=True).tolist()


@pytest.mark.parametrize("side", [1, 2, 5, 32, 70, 100])
def test_position_buckets_of_another_table(side: int) -> None:
    table = position_buckets(side)
    assert table.shape == (side + 1, side)
    for n in range(1, side + 1):
        for i in range(n):
            exact = i * side // n
            assert exact - 1 <= table[n, i] <= exact


def _installed_buckets(n: int) -> list[int]:
    """The buckets that the installed transformers gives a side of n patches, read off its own embedding."""
    embeddings = Idefics2VisionEmbeddings(Idefics2VisionConfig(hidden_size=1, image_size=980, patch_size=14))
    embeddings.requires_grad_(False)
    embeddings.patch_embedding.weight.zero_()
    embeddings.patch_embedding.bias.zero_()
    embeddings.position_embedding.weight.copy_(torch.arange(4900.0)[:, None])
    ids = embeddings(torch.zeros(1, 3, n * 14, 14), torch.ones(1, n, 1, dtype=torch.bool))
    return [int(i) // 70 for i in ids.flatten()]


def test_position_buckets_differ_from_the_installed_reference_at_49_and_58_only() -> None:
    table = position_buckets(70)
    differing = [n for n in range(27, 71) if table[n, :n].tolist() != _installed_buckets(n)]
    assert differing == [49, 58]


@pytest.mark.parametrize(
    ("tiles", "height", "width"), [(2, 378, 378), (1, 980, 490), (1, 451, 397), (1, 378, 980), (3, 14, 391)]
)
def test_tower_equals_reference(pair: Pair, tiles: int, height: int, width: int) -> None:
    pixels = torch.rand((tiles, 3, height, width), generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        ours = pair.ours.vision(pixels)
        expected = pair.reference.model.vision_model(pixels).last_hidden_state
    assert ours.shape == (tiles, (height // 14) * (width // 14), pair.ours.config.vision.hidden_size)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


def test_pixels_beyond_the_last_whole_patch_do_not_count(pair: Pair) -> None:
    pixels = torch.rand(1, 3, 69, 111)
    with torch.inference_mode():
        torch.testing.assert_close(pair.ours.vision(pixels), pair.ours.vision(pixels[..., :56, :98]))


def test_every_side_has_its_own_patch_count(pair: Pair) -> None:
    """Height and width are not exchanged: a transposed picture gives other rows."""
    pixels = torch.rand(1, 3, 56, 98)
    with torch.inference_mode():
        assert not torch.allclose(pair.ours.vision(pixels), pair.ours.vision(pixels.transpose(2, 3)), atol=1e-2)


@pytest.mark.parametrize(("height", "width"), [(13, 378), (378, 994), (994, 378)])
def test_sides_outside_the_table_are_refused(pair: Pair, height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 70 patches of 14 pixels a side, got {height}×{width}"):
        pair.ours.vision(torch.zeros(1, 3, height, width))
