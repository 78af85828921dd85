"""Penalties, bias and masks against their formulas, one logit at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.runner.input_batch import RequestState
from server.runner.penalties import adjust_logits
from tests.runner.states import make_state

VOCAB = 12
FORBIDDEN = (10, 11)
INF = float("inf")


def adjusted(row: list[float], state: RequestState, forbidden: tuple[int, ...] = FORBIDDEN) -> list[float]:
    logits = torch.tensor([row])
    adjust_logits(logits, [state], forbidden)
    result: list[float] = logits[0].tolist()
    return result


def naive(row: list[float], state: RequestState) -> list[float]:
    """The formulas, in the documented order."""
    sampling = state.source.sampling
    prompt = state.source.prompt_token_ids
    answer = state.token_ids[len(prompt) :]
    out = []
    for token, value in enumerate(row):
        if token in (*prompt, *answer) and token not in FORBIDDEN:
            value = value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
        times = answer.count(token)
        value -= sampling.presence_penalty * (times > 0) + sampling.frequency_penalty * times
        value += sampling.logit_bias.get(token, 0.0)
        if token in state.source.masked_token_ids and len(answer) < sampling.min_tokens:
            value = -INF
        out.append(-INF if token in FORBIDDEN else value)
    return out


ROW = [float(value) for value in (3, -2, 0, 1.5, -0.5, 2, -4, 0.25, 6, -1, 9, 9)]


def test_repetition_divides_what_is_positive_and_multiplies_what_is_not() -> None:
    out = adjusted(ROW, make_state([0, 1, 2], [3, 3], repetition_penalty=2.0))
    assert out[:5] == [1.5, -4.0, 0.0, 0.75, -0.5]


def test_image_tokens_in_the_prompt_are_no_repetition() -> None:
    """Their logits are masked anyway; what matters is that a row with pictures costs and changes nothing else."""
    row = [1.0] * VOCAB
    state = make_state([0, 10, 11, 11, 10], repetition_penalty=2.0)
    logits = torch.tensor([row])
    adjust_logits(logits, [state], [10])  # 11 is an ordinary id here
    assert logits[0].tolist() == [0.5, *[1.0] * 9, -INF, 0.5]


def test_where_every_token_is_hidden_there_is_nothing_to_repeat() -> None:
    assert adjusted(ROW, make_state([10, 11, 10], repetition_penalty=2.0))[:10] == ROW[:10]


def test_presence_counts_once_and_frequency_each_time_and_the_prompt_never() -> None:
    out = adjusted(ROW, make_state([0, 8], [3, 5, 3, 3], presence_penalty=0.5))
    assert [out[token] for token in (0, 3, 5, 8)] == [3, 1.0, 1.5, 6]
    out = adjusted(ROW, make_state([0, 8], [3, 5, 3, 3], frequency_penalty=0.5))
    assert [out[token] for token in (0, 3, 5, 8)] == [3, 0.0, 1.5, 6]
    out = adjusted(ROW, make_state([0, 8], [3, 5, 3, 3], presence_penalty=-0.5, frequency_penalty=-1.0))
    assert [out[token] for token in (0, 3, 5, 8)] == [3, 5.0, 3.5, 6]


def test_penalties_before_the_first_token_change_nothing() -> None:
    state = make_state([0, 3], presence_penalty=2.0, frequency_penalty=2.0)
    assert adjusted(ROW, state)[:10] == ROW[:10]


def test_bias_is_added() -> None:
    out = adjusted(ROW, make_state(logit_bias={0: 100.0, 3: -100.0, 5: 0.5}))
    assert [out[token] for token in (0, 3, 5, 6)] == [103, -98.5, 2.5, -4]


def test_no_bias_brings_a_forbidden_token_back() -> None:
    out = adjusted(ROW, make_state(logit_bias={10: 100.0, 11: 100.0}, repetition_penalty=0.01))
    assert out[10:] == [-INF, -INF]


@pytest.mark.parametrize(("length", "masked"), [(0, True), (1, True), (2, False), (3, False)])
def test_ids_that_end_are_masked_until_min_tokens_are_out(length: int, masked: bool) -> None:
    state = make_state(answer=[1] * length, masked=(2, 8), min_tokens=2, logit_bias={8: 100.0})
    out = adjusted(ROW, state)
    assert [value == -INF for value in (out[2], out[8], out[3])] == [masked, masked, False]


def test_min_tokens_without_ids_that_end_masks_nothing() -> None:
    assert adjusted(ROW, make_state(min_tokens=5))[:10] == ROW[:10]


def test_a_request_that_asks_for_nothing_keeps_its_logits_to_the_bit() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    states = [make_state([1, 2], [3]), make_state([1], [2], repetition_penalty=1.5), make_state([4], [5])]
    adjust_logits(logits, states, [38, 39])
    assert torch.equal(logits[[0, 2], :38], before[[0, 2], :38])
    assert not torch.equal(logits[1, :38], before[1, :38])
    assert (logits[:, 38:] == -INF).all()


IDS = st.integers(0, VOCAB - 1)


@given(
    row=st.lists(st.floats(-20, 20, width=32), min_size=VOCAB, max_size=VOCAB),
    prompt=st.lists(IDS, min_size=1, max_size=8),
    answer=st.lists(st.integers(0, 9), max_size=8),
    masked=st.lists(IDS, max_size=3, unique=True),
    repetition=st.sampled_from([1.0, 0.5, 1.3, 2.0]),
    presence=st.sampled_from([0.0, -1.5, 0.7]),
    frequency=st.sampled_from([0.0, -0.4, 2.0]),
    bias=st.dictionaries(IDS, st.floats(-100, 100, width=32), max_size=4),
    min_tokens=st.integers(0, 8),
)
@settings(max_examples=300, deadline=None)
def test_all_together_follow_the_formulas(
    row: list[float],
    prompt: list[int],
    answer: list[int],
    masked: list[int],
    repetition: float,
    presence: float,
    frequency: float,
    bias: dict[int, float],
    min_tokens: int,
) -> None:
    state = make_state(
        prompt,
        answer,
        masked=tuple(masked),
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
        min_tokens=min_tokens,
    )
    for ours, expected in zip(adjusted(row, state), naive(row, state), strict=True):
        assert ours == expected or math.isclose(ours, expected, rel_tol=1e-5, abs_tol=1e-4)


def test_nan_stays_in_its_own_row() -> None:
    logits = torch.stack([torch.full((VOCAB,), torch.nan), torch.tensor(ROW)])
    states = [make_state([1], [2], repetition_penalty=1.5), make_state([0], [2], repetition_penalty=2.0)]
    adjust_logits(logits, states, FORBIDDEN)
    assert logits[1, 0] == 1.5
    assert not logits[1].isnan().any()


def test_rows_and_requests_must_match() -> None:
    with pytest.raises(ValueError, match="zip"):
        adjust_logits(torch.zeros(2, VOCAB), [make_state()], FORBIDDEN)
