"""From a plan to packed indices: each number checked against the request it came from."""

from __future__ import annotations

import random

import pytest
import torch

from server.engine.step import ScheduledRequest
from server.runner.input_batch import InputBatch, RequestState, build_input_batch
from server.types import PlaceholderRange
from tests.runner.states import make_new, make_state, with_answer

CPU = torch.device("cpu")
ROWS = 4


def chunk(
    request_id: str, start: int, length: int, *, slots: dict[int, int] | None = None, resumed: bool = False
) -> ScheduledRequest:
    return ScheduledRequest(
        request_id=request_id,
        num_computed_tokens=start,
        num_tokens=length,
        new_block_ids=[],
        resumed=resumed,
        tile_slots=slots or {},
    )


def build(scheduled: list[ScheduledRequest], *states: RequestState) -> InputBatch:
    by_id = {state.source.request_id: state for state in states}
    return build_input_batch(scheduled, by_id, rows_per_tile=ROWS)


def pictured(name: str, placeholders: list[int], length: int) -> RequestState:
    """A request of `length` distinct ids with a picture of 4 rows at each of these offsets."""
    source = make_new(
        range(100, 100 + length),
        request_id=name,
        placeholders=tuple(PlaceholderRange(offset, ROWS) for offset in placeholders),
    )
    return RequestState(source=source, token_ids=list(source.prompt_token_ids))


def test_a_decode_and_a_whole_prompt() -> None:
    decode = with_answer(make_state([5, 6, 7], request_id="a"), [8, 9])
    decode.block_ids = [3, 1]
    prompt = make_state([50, 51, 52], request_id="b")
    prompt.block_ids = [2]
    batch = build([chunk("a", 4, 1), chunk("b", 0, 3)], decode, prompt)
    assert batch.token_ids.tolist() == [9, 50, 51, 52]
    assert batch.positions.tolist() == [4, 0, 1, 2]
    assert batch.logits_indices.tolist() == [0, 3]
    assert batch.sampled == [decode, prompt]
    assert (batch.query_lens, batch.seq_lens) == ([1, 3], [5, 3])
    assert batch.block_tables == [[3, 1], [2]]
    assert batch.image_positions.numel() == batch.image_rows.numel() == 0
    for tensor in (batch.token_ids, batch.positions, batch.image_positions, batch.image_rows, batch.logits_indices):
        assert tensor.dtype == torch.int64


@pytest.mark.parametrize(("length", "sampled"), [(1, False), (4, False), (5, True)])
def test_only_a_chunk_that_reaches_the_last_token_is_sampled(length: int, sampled: bool) -> None:
    batch = build([chunk("r", 0, length)], make_state(range(5)))
    assert bool(batch.sampled) is sampled
    assert batch.logits_indices.tolist() == ([4] if sampled else [])


def test_a_resumed_request_samples_after_its_answer_so_far() -> None:
    state = with_answer(make_state(range(5)), [70, 71])
    assert not build([chunk("r", 0, 5)], state).sampled
    batch = build([chunk("r", 0, 7)], state)
    assert batch.token_ids.tolist() == [0, 1, 2, 3, 4, 70, 71]
    assert batch.logits_indices.tolist() == [6]


def test_rows_of_a_whole_picture() -> None:
    batch = build([chunk("r", 0, 12, slots={0: 2, 1: 0})], pictured("r", [2, 7], 12))
    assert batch.image_positions.tolist() == [2, 3, 4, 5, 7, 8, 9, 10]
    assert batch.image_rows.tolist() == [8, 9, 10, 11, 0, 1, 2, 3]


def test_a_chunk_takes_its_part_of_a_picture() -> None:
    state = pictured("r", [2, 7], 12)
    batch = build([chunk("r", 4, 5, slots={0: 2, 1: 0})], state)  # tokens 4 to 8
    assert batch.image_positions.tolist() == [0, 1, 3, 4]
    assert batch.image_rows.tolist() == [10, 11, 0, 1]


def test_positions_of_pictures_count_what_stands_before_in_the_batch() -> None:
    decode, other = make_state([5], request_id="a"), pictured("b", [1], 8)
    batch = build([chunk("a", 0, 1), chunk("b", 0, 3, slots={0: 5})], decode, other)
    assert batch.image_positions.tolist() == [2, 3]
    assert batch.image_rows.tolist() == [20, 21]


def test_random_batches_against_a_walk_over_every_token() -> None:
    rng = random.Random(2)
    for _ in range(200):
        states, scheduled = [], []
        for index in range(rng.randint(1, 4)):
            placeholders, offset = [], rng.randint(0, 3)
            for _ in range(rng.randint(0, 3)):
                placeholders.append(offset)
                offset += ROWS + rng.randint(0, 3)
            state = pictured(f"r{index}", placeholders, offset + rng.randint(1, 4))
            start = rng.randrange(len(state.token_ids))
            length = rng.randint(1, len(state.token_ids) - start)
            touched = [
                number
                for number, place in enumerate(state.source.placeholders)
                if place.offset < start + length and place.end > start
            ]
            slots = dict(zip(touched, rng.sample(range(9), len(touched)), strict=True))
            states.append(state)
            scheduled.append(chunk(f"r{index}", start, length, slots=slots))
        batch = build(scheduled, *states)
        expected_tokens, expected_rows = [], {}
        for state, item in zip(states, scheduled, strict=True):
            for position in range(item.num_computed_tokens, item.num_computed_tokens + item.num_tokens):
                for number, place in enumerate(state.source.placeholders):
                    if place.offset <= position < place.end:
                        row = item.tile_slots[number] * ROWS + position - place.offset
                        expected_rows[len(expected_tokens)] = row
                expected_tokens.append(state.token_ids[position])
        assert batch.token_ids.tolist() == expected_tokens
        rows = dict(zip(batch.image_positions.tolist(), batch.image_rows.tolist(), strict=True))
        assert rows == expected_rows
        assert sum(batch.query_lens) == len(expected_tokens)
