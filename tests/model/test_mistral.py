from __future__ import annotations

import pytest
import torch

from server.model.layers.rotary import Rotary, rotate
from tests.model.twins import Pair, run


def _token_ids(count: int) -> torch.Tensor:
    return torch.randint(3, 32000, (count,), generator=torch.Generator().manual_seed(2))


def test_logits_equal_reference(pair: Pair) -> None:
    token_ids = _token_ids(150)
    with torch.inference_mode():
        hidden = run(pair.ours, pair.ours.embed(token_ids))
        logits = pair.ours.compute_logits(hidden)
        expected = pair.reference(input_ids=token_ids[None]).logits[0]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


def test_chunks_and_single_tokens_equal_the_whole(pair: Pair) -> None:
    embeddings = pair.ours.embed(_token_ids(40))
    whole = run(pair.ours, embeddings)
    torch.testing.assert_close(run(pair.ours, embeddings, [7, 30, 1, 1, 1]), whole, atol=1e-5, rtol=1e-4)


def test_a_token_sees_no_later_one(pair: Pair) -> None:
    embeddings = pair.ours.embed(_token_ids(20))
    changed = embeddings.clone()
    changed[10:] += 1
    before, after = run(pair.ours, embeddings), run(pair.ours, changed)
    torch.testing.assert_close(before[:10], after[:10])
    assert not torch.allclose(before[10:], after[10:], atol=1e-2)


def test_cache_of_every_layer_is_required(pair: Pair) -> None:
    with pytest.raises(ValueError, match="shorter"):
        pair.ours(pair.ours.embed(_token_ids(2)), torch.arange(2), [], None)


@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
def test_rotation_turns_pairs_by_position(theta: float) -> None:
    rotary = Rotary(head_dim=8, max_positions=64, theta=theta)
    heads = torch.randn(3, 5, 8, dtype=torch.float64)
    positions = torch.tensor([0, 7, 63])
    turned = rotate(heads, *rotary(positions, torch.float64))
    # Dimensions i and i + 4 as the real and imaginary part of one number.
    numbers = torch.complex(heads[..., :4], heads[..., 4:])
    angles = positions[:, None] * theta ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    expected = numbers * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(turned, torch.cat((expected.real, expected.imag), dim=-1), atol=1e-5, rtol=0)


def test_far_positions_equal_reference(pair: Pair) -> None:
    """The last position of the context, where float32 angles are coarse and must be coarse in the same way."""
    rotary = pair.ours.text.rotary
    positions = torch.tensor([0, 1, 4095, 4096, 32767])
    cos, sin = rotary(positions, torch.float32)
    reference_cos, reference_sin = pair.reference.model.text_model.rotary_emb(torch.zeros(1), positions[None])
    half = sin.shape[-1] // 2
    torch.testing.assert_close(cos[:, 0], reference_cos[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(sin[:, 0, half:], reference_sin[0, :, half:], atol=1e-6, rtol=0)
    torch.testing.assert_close(-sin[:, 0, :half], reference_sin[0, :, :half], atol=1e-6, rtol=0)
