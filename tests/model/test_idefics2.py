from __future__ import annotations

import pytest
import torch

from server.model.config import PixelNormalization
from server.model.idefics2 import PixelNormalizer
from tests.model.twins import Pair, load, run

BOUNDARY, IMAGE = 32000, 32001


def _tiles(count: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def test_tiles_are_encoded_as_by_reference(pair: Pair) -> None:
    tiles = _tiles(2, 385, 450)
    pixels = (tiles.float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        rows = pair.ours.encode_tiles(tiles)
        features = pair.reference.model.get_image_features(pixels.permute(0, 3, 1, 2)[None]).pooler_output
    expected = torch.cat(features).view_as(rows)
    torch.testing.assert_close(rows, expected, atol=5e-5, rtol=1e-4)


def test_normalization_follows_the_checkpoint() -> None:
    normalizer = PixelNormalizer(PixelNormalization(rescale_factor=1 / 128, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0)))
    pixels = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    expected = torch.tensor([(0 - 0.1) / 0.5, (1 - 0.2) / 1.0, (255 / 128 - 0.3) / 2.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(normalizer(pixels, torch.float32), expected)


def test_prompt_with_two_pictures_equals_reference(pair: Pair) -> None:
    """Two tiles between words: rows land at their placeholders, in order, and the words after depend on them."""
    tiles = _tiles(2, 210, 182)
    token_ids = torch.tensor([1, 2323, BOUNDARY, *[IMAGE] * 64, BOUNDARY, *[IMAGE] * 64, BOUNDARY, 1824, 349, 32002])
    with torch.inference_mode():
        rows = pair.ours.encode_tiles(tiles).flatten(0, 1)
        embeddings = pair.ours.embed(token_ids)
        merged = pair.ours.merge(embeddings, rows, (token_ids == IMAGE).nonzero().flatten())
        logits = pair.ours.compute_logits(run(pair.ours, merged))
        pixels = ((tiles.float() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2)[None]
        expected = pair.reference(input_ids=token_ids[None], pixel_values=pixels).logits[0]
        swapped = pair.reference(input_ids=token_ids[None], pixel_values=pixels.flip(1)).logits[0]
    assert merged.data_ptr() == embeddings.data_ptr()
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-3)
    assert not torch.allclose(swapped[-1], expected[-1], atol=1e-2)  # so the tolerance above tells pictures apart


def test_merging_no_rows_changes_nothing(pair: Pair) -> None:
    embeddings = pair.ours.embed(torch.arange(5))
    hidden = embeddings.shape[1]
    pair.ours.merge(embeddings, torch.empty(0, hidden), torch.empty(0, dtype=torch.int64))
    torch.testing.assert_close(embeddings, pair.ours.embed(torch.arange(5)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(pair: Pair, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    half = load(request.getfixturevalue("checkpoint"), dtype=dtype)
    tiles = _tiles(1, 140, 112)
    with torch.inference_mode():
        rows = half.encode_tiles(tiles)
        expected_rows = pair.ours.encode_tiles(tiles)
        hidden = run(half, half.embed(torch.arange(3, 40)))
        expected = run(pair.ours, pair.ours.embed(torch.arange(3, 40)))
        logits = half.compute_logits(hidden)
    assert rows.dtype == hidden.dtype == dtype
    assert logits.dtype == torch.float32
    for got, wanted in ((rows, expected_rows), (hidden, expected)):
        cosine = torch.nn.functional.cosine_similarity(got.float().flatten(), wanted.flatten(), dim=0)
        assert cosine > 0.999


def test_parameters_take_no_gradient(pair: Pair) -> None:
    assert not any(parameter.requires_grad for parameter in pair.ours.parameters())
