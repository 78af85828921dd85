"""Which tokens may be drawn, how often, and that nothing but a row's own data decides it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.api.sampling import MIN_TEMPERATURE
from server.runner.input_batch import RequestState
from server.runner.sampler import NO_TOKEN, Sampler
from server.runner.truncation import TOP_CANDIDATES, truncate
from server.types import SamplingParams
from tests.runner.states import make_state

CPU = torch.device("cpu")
# 99.99 % quantiles of the chi-square distribution by degrees of freedom. Seeds are fixed: these cannot flicker.
CHI_SQUARE = {1: 15.14, 2: 18.42, 3: 21.11, 4: 23.51, 5: 25.74, 7: 29.88, 9: 33.72}


def make_sampler(forbidden: tuple[int, ...] = ()) -> Sampler:
    return Sampler(forbidden, CPU)


def sample_one(row: Tensor, state: RequestState, *, forbidden: tuple[int, ...] = ()) -> int | None:
    (token,) = sample(make_sampler(forbidden), row.clone()[None], [state])
    return token


def sample(sampler: Sampler, logits: Tensor, states: Sequence[RequestState]) -> list[int | None]:
    return [None if token == NO_TOKEN else token for token in sampler.sample(logits, states).tolist()]


def random_logits(vocab: int, seed: int, *, spread: float = 3.0) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread


# -- candidates -----------------------------------------------------------------------------------------------------


def naive_candidates(probs: Tensor, sampling: SamplingParams) -> tuple[list[int], float]:
    """Ids by a full sort in float64, and how near any limit was to a decision: ties with it prove nothing."""
    order = sorted(range(len(probs)), key=lambda index: (-float(probs[index]), index))
    values = [float(probs[index]) for index in order]
    nearest = 1.0
    if sampling.top_k:
        order, values = order[: sampling.top_k], values[: sampling.top_k]
    if sampling.top_p < 1.0:
        total, before, kept = sum(values), 0.0, 0
        for value in values:
            if kept:
                nearest = min(nearest, abs(before / total - sampling.top_p))
            if kept and before >= sampling.top_p * total:
                break
            before, kept = before + value, kept + 1
        order, values = order[:kept], values[:kept]
    if sampling.min_p > 0.0:
        limit = sampling.min_p * values[0]
        nearest = min(nearest, min((abs(value - limit) / values[0] for value in values[1:]), default=1.0))
        order = [index for index, value in zip(order, values, strict=True) if value >= limit]
    return order, nearest


def check_candidates(probs: Tensor, sampling: SamplingParams) -> int:
    """Compare with the naive set; where probabilities tie at its edge, any of the tied will do. Returns its size."""
    (kept,), (ids,) = truncate(probs[None], [sampling])
    assert bool((kept[kept.count_nonzero() :] == 0).all())
    ids, kept = ids[kept > 0], kept[kept > 0]
    expected, nearest = naive_candidates(probs, sampling)
    expected = [index for index in expected if probs[index] > 0]  # what cannot come need not be left
    if nearest < 1e-6:
        return 0
    assert len(ids) == len(expected)
    assert len(set(ids.tolist())) == len(ids)
    torch.testing.assert_close(kept, probs[ids], rtol=0, atol=0)
    torch.testing.assert_close(kept, probs[expected], rtol=0, atol=0)  # sorted, and the same multiset
    edge = float(kept[-1])
    assert {i for i in ids.tolist() if probs[i] > edge} == {i for i in expected if probs[i] > edge}
    return len(ids)


SHAPES = {
    "flat": lambda vocab, seed: torch.full((vocab,), 1.0 / vocab),
    "nearly flat": lambda vocab, seed: torch.softmax(random_logits(vocab, seed, spread=0.05), -1),
    "wide": lambda vocab, seed: torch.softmax(random_logits(vocab, seed, spread=1.0), -1),
    "usual": lambda vocab, seed: torch.softmax(random_logits(vocab, seed, spread=4.0), -1),
    "peaked": lambda vocab, seed: torch.softmax(random_logits(vocab, seed, spread=40.0), -1),
    "two levels": lambda vocab, seed: torch.softmax((torch.arange(vocab) % 3 == 0).float() * 2, -1),
    "few tokens": lambda vocab, seed: torch.softmax(
        torch.where(torch.arange(vocab) < 5, random_logits(vocab, seed), torch.tensor(float("-inf"))), -1
    ),
}
SETTINGS = [
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": TOP_CANDIDATES},
    {"top_k": TOP_CANDIDATES + 1},
    {"top_k": 1500},
    {"top_k": 10**6},
    {"top_p": 0.0},
    {"top_p": 1e-9},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"min_p": 0.9},
    {"min_p": 1e-4},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.5},
    {"top_k": 1500, "top_p": 0.7},
    {"top_p": 0.8, "min_p": 0.02},
    {"top_k": 30, "top_p": 0.95, "min_p": 0.1},
    {"top_k": 10**6, "top_p": 0.5, "min_p": 0.5},
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("limits", SETTINGS, ids=lambda limits: "_".join(f"{k}={v}" for k, v in limits.items()))
def test_candidates_are_those_of_a_full_sort(shape: str, limits: dict[str, float]) -> None:
    """2,000 ids, so that flat distributions reach beyond what a partial sort looks at."""
    sampling = SamplingParams(**limits)  # type: ignore[arg-type]
    for vocab in (7, 2000):
        check_candidates(SHAPES[shape](vocab, 1), sampling)


@given(
    st.integers(0, 2**31),
    st.sampled_from([3, 600, 1300]),
    st.sampled_from([0.1, 0.7, 2.0, 9.0]),
    st.sampled_from([0, 1, 2, 50, 511, 512, 513, 900, 5000]),
    st.one_of(st.just(1.0), st.floats(0.0, 1.0)),
    st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
)
@settings(max_examples=150, deadline=None)
def test_candidates_of_random_distributions(
    seed: int, vocab: int, spread: float, top_k: int, top_p: float, min_p: float
) -> None:
    probs = torch.softmax(random_logits(vocab, seed, spread=spread), -1)
    if 512 < top_k < vocab and top_p < 1.0 and min_p > 0.0:
        return  # has a test of its own
    check_candidates(probs, SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p))


def test_a_flat_distribution_is_not_cut_short() -> None:
    probs = SHAPES["flat"](4000, 0)
    assert check_candidates(probs, SamplingParams(top_p=0.90005)) == 3601
    assert check_candidates(probs, SamplingParams(top_k=3000)) == 3000
    assert check_candidates(probs, SamplingParams(min_p=0.999)) == 4000


def test_top_p_is_of_all_that_a_large_top_k_leaves_even_when_min_p_leaves_few() -> None:
    probs = torch.cat((torch.full((100,), 0.4 / 100), torch.full((900,), 0.6 / 900), torch.zeros(1000)))
    assert check_candidates(probs, SamplingParams(top_k=1000, top_p=0.5503, min_p=0.5)) == 100


# -- greedy ---------------------------------------------------------------------------------------------------------


def test_temperature_zero_and_top_k_one_take_the_best() -> None:
    logits = torch.stack([random_logits(300, seed) for seed in range(20)])
    best = logits.argmax(-1).tolist()
    for sampling in ({"temperature": 0.0}, {"temperature": 2.0, "top_k": 1}, {"temperature": 0.0, "top_p": 0.1}):
        states = [make_state(seed=index, **sampling) for index in range(20)]
        assert sample(make_sampler(), logits.clone(), states) == best


def test_the_smallest_temperature_that_clients_may_use_is_greedy() -> None:
    for scale in (1.0, 100.0, 1e4):
        for seed in range(20):
            row = random_logits(300, seed) * scale
            row[row.argmax()] += 0.5  # nearer than that, the second has a chance at any temperature
            for limits in ({}, {"top_p": 0.9}, {"top_k": 700}, {"min_p": 0.1}):
                state = make_state(temperature=MIN_TEMPERATURE, seed=seed, **limits)  # type: ignore[arg-type]
                assert sample_one(row, state) == int(row.argmax())


def test_tiny_truncations_are_greedy() -> None:
    for seed in range(20):
        row = random_logits(300, seed)
        for limits in ({"top_p": 0.0}, {"min_p": 1.0}, {"top_p": 1e-12}):
            assert sample_one(row, make_state(seed=seed, **limits)) == int(row.argmax())


def test_the_rarest_noise_does_not_change_a_certain_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.rand gives an exact 0 once in 2**24 draws, and minus its logarithm is infinite."""
    row = torch.tensor([-1000.0, 1000.0, -1000.0])
    monkeypatch.setattr(torch, "rand", lambda *_, out, **__: out.zero_())
    assert sample_one(row, make_state(seed=1)) == 1


# -- frequencies ----------------------------------------------------------------------------------------------------


def chi_square(counts: list[int], probs: Tensor) -> float:
    total = sum(counts)
    expected = [total * float(p) for p in probs]
    assert all(c == 0 for c, e in zip(counts, expected, strict=True) if e == 0), "a token that cannot come was drawn"
    return sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True) if e > 0)


def draw_counts(row: Tensor, states: list[RequestState]) -> list[int]:
    counts = [0] * len(row)
    for token in sample(make_sampler(), row.expand(len(states), -1).clone(), states):
        assert token is not None
        counts[token] += 1
    return counts


ROW = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -3.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_of_many_seeds_have_the_right_frequencies(temperature: float) -> None:
    counts = draw_counts(ROW, [make_state(temperature=temperature, seed=seed) for seed in range(3000)])
    assert chi_square(counts, torch.softmax(ROW.double() / temperature, -1)) < CHI_SQUARE[5]


def test_draws_of_one_seed_over_an_answer_have_the_right_frequencies() -> None:
    counts = draw_counts(ROW, [make_state(answer=[1] * length, seed=11) for length in range(3000)])
    assert chi_square(counts, torch.softmax(ROW.double(), -1)) < CHI_SQUARE[5]


@pytest.mark.parametrize(
    ("limits", "left"),
    [({"top_k": 3}, [0, 3, 4]), ({"top_p": 0.75}, [0, 3]), ({"min_p": 0.2}, [0, 3, 4]), ({"top_k": 4}, [0, 1, 3, 4])],
)
def test_what_is_left_is_drawn_in_proportion(limits: dict[str, float], left: list[int]) -> None:
    counts = draw_counts(ROW, [make_state(seed=seed, **limits) for seed in range(2000)])
    probs = torch.zeros(6, dtype=torch.float64)
    probs[left] = torch.softmax(ROW[left].double(), -1)
    assert chi_square(counts, probs) < CHI_SQUARE[len(left) - 1]


def test_consecutive_draws_are_independent() -> None:
    """Pairs of draws of one seed at neighbouring positions: all nine combinations as often as they should be."""
    row = torch.tensor([0.0, 0.7, -0.5])
    states = [make_state(answer=[1] * length, seed=5) for length in range(6001)]
    tokens = sample(make_sampler(), row.expand(6001, -1).clone(), states)
    counts = [0] * 9
    for first, second in zip(tokens[::2], tokens[1::2], strict=False):
        assert first is not None
        assert second is not None
        counts[3 * first + second] += 1
    probs = torch.softmax(row.double(), -1)
    assert chi_square(counts, torch.outer(probs, probs).flatten()) < CHI_SQUARE[9]


# -- seeds ----------------------------------------------------------------------------------------------------------


def mixed_states(count: int, rng: random.Random) -> list[RequestState]:
    return [
        make_state(
            prompt=[rng.randrange(50) for _ in range(3)],
            answer=[rng.randrange(50) for _ in range(rng.randrange(4))],
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_p=rng.choice([1.0, 0.8]),
            top_k=rng.choice([0, 7]),
            min_p=rng.choice([0.0, 0.05]),
            repetition_penalty=rng.choice([1.0, 1.3]),
            presence_penalty=rng.choice([0.0, 0.5]),
            seed=rng.randrange(1 << 40),
        )
        for _ in range(count)
    ]


def test_batch_mates_and_row_order_change_nothing() -> None:
    rng = random.Random(4)
    states = mixed_states(40, rng)
    logits = torch.stack([random_logits(50, seed) for seed in range(40)])
    together = sample(make_sampler((48, 49)), logits.clone(), states)
    alone = [sample_one(row, state, forbidden=(48, 49)) for row, state in zip(logits, states, strict=True)]
    assert together == alone
    order = list(range(40))
    rng.shuffle(order)
    shuffled = sample(make_sampler((48, 49)), logits[order].clone(), [states[index] for index in order])
    assert [shuffled[order.index(index)] for index in range(40)] == alone
    assert len(set(alone)) > 5


def test_a_sampler_has_no_memory() -> None:
    """The same seed and position give the same token after other draws, as they must after a preemption."""
    sampler = make_sampler()
    row, state = random_logits(50, 1), make_state(answer=[1, 2], seed=9)
    first = sample(sampler, row.clone()[None], [state])
    sample(sampler, torch.stack([random_logits(50, 2)] * 3), mixed_states(3, random.Random(1)))
    torch.manual_seed(0)
    torch.rand(10)
    assert sample(sampler, row.clone()[None], [state]) == first


def test_seed_and_position_matter_and_a_missing_seed_is_zero() -> None:
    row = torch.zeros(1000)
    by_seed = {sample_one(row, make_state(seed=seed)) for seed in range(50)}
    by_position = {sample_one(row, make_state(answer=[1] * length, seed=0)) for length in range(50)}
    assert len(by_seed) > 45
    assert len(by_position) > 45
    assert sample_one(row, make_state(seed=None)) == sample_one(row, make_state(seed=0))
    for seed in (-(2**63), -1, 2**63 - 1):  # the range that the API lets through
        assert sample_one(row, make_state(seed=seed)) is not None


def test_neighbouring_seeds_and_positions_do_not_overlap() -> None:
    """Seed s at position i is not seed s + 1 at position i - 1, as a counter would make it."""
    row = torch.zeros(4000)

    def draws(seed: int) -> list[int | None]:
        return [sample_one(row, make_state(answer=[1] * length, seed=seed)) for length in range(20)]

    first, second = draws(100), draws(101)
    assert not set(first) & set(second)


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    sample_one(random_logits(50, 1), make_state(seed=3))
    assert torch.equal(torch.get_rng_state(), before)


# -- tokens that may not come ---------------------------------------------------------------------------------------

MODES = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 2.0, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 1.0, "min_p": 0.9},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 700, "top_p": 0.99, "min_p": 0.001},
    {"temperature": 1.0, "repetition_penalty": 0.1},
    {"temperature": 1.0, "presence_penalty": -2.0, "frequency_penalty": -2.0},
    {"temperature": 0.0, "min_tokens": 5},
]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "_".join(f"{k}={v}" for k, v in mode.items()))
def test_image_tokens_never_come_whatever_is_asked_for(mode: dict[str, float]) -> None:
    forbidden = (598, 599)
    for seed in range(25):
        row = random_logits(600, seed)
        row[list(forbidden)] = 1e4
        bias = {598: 100.0, 599: 100.0, 3: -100.0}
        state = make_state([1, 598, 599], [599, 4], masked=(2,), seed=seed, logit_bias=bias, **mode)
        token = sample_one(row, state, forbidden=forbidden)
        assert token is not None
        assert token not in forbidden


def test_bias_decides() -> None:
    row = torch.zeros(50)
    for seed in range(20):
        assert sample_one(row, make_state(seed=seed, logit_bias={17: 100.0})) == 17
        assert sample_one(row, make_state(seed=seed, logit_bias=dict.fromkeys(range(49), -100.0))) == 49


def test_ids_that_end_wait_for_min_tokens() -> None:
    row = torch.zeros(50)
    row[[2, 7]] = 50.0
    for temperature in (0.0, 1.0):
        early = make_state(answer=[1, 1], masked=(2, 7), min_tokens=3, temperature=temperature, seed=1)
        late = make_state(answer=[1, 1, 1], masked=(2, 7), min_tokens=3, temperature=temperature, seed=1)
        assert sample_one(row, early) not in (2, 7)
        assert sample_one(row, late) in (2, 7)


# -- rows that are of no use ----------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "_".join(f"{k}={v}" for k, v in mode.items()))
def test_rows_without_sense_give_none_and_their_neighbours_what_they_had(mode: dict[str, float]) -> None:
    good = torch.stack([random_logits(600, seed) for seed in range(3)])
    one_nan, all_nan, nothing, infinite = (good[0].clone() for _ in range(4))
    one_nan[300] = NAN
    all_nan[:] = NAN
    nothing[:] = -INF
    infinite[5] = INF
    only_forbidden = torch.full((600,), -INF)
    only_forbidden[599] = 3.0
    rows = torch.stack([one_nan, good[0], all_nan, nothing, good[1], infinite, only_forbidden, good[2]])
    states = [make_state(seed=index, masked=(2,), **mode) for index in range(len(rows))]
    tokens = sample(make_sampler((599,)), rows.clone(), states)
    expected = [sample_one(rows[index], states[index], forbidden=(599,)) for index in (1, 4, 7)]
    assert [tokens[index] for index in (0, 2, 3, 5, 6)] == [None] * 5
    assert [tokens[index] for index in (1, 4, 7)] == expected
    assert None not in expected


def test_logits_that_are_partly_minus_infinity_are_fine() -> None:
    row = torch.full((100,), -INF)
    row[[4, 9]] = torch.tensor([1.0, 1.5])
    tokens = {sample_one(row, make_state(seed=seed)) for seed in range(40)}
    assert tokens == {4, 9}


def test_no_rows_are_no_tokens() -> None:
    assert sample(make_sampler(), torch.empty(0, 10), []) == []
