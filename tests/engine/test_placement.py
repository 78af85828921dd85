"""Who gets a request: the engine that knows it, within bounds, else the one with least to do."""

from __future__ import annotations

import random

import pytest

from server.engine import placement
from server.engine.placement import BOUND, Placement
from server.types import EngineRequest
from tests.factories import make_request

ALL = (0, 1, 2)


def conversation(number: int, *, turns: int = 1, **settings: object) -> EngineRequest:
    """A prompt of which each turn begins like the one before."""
    return make_request(range(1000 * number, 1000 * number + 70 + 10 * turns), **settings)


def test_strangers_are_spread_by_load() -> None:
    place = Placement(3)
    assert [place.place(conversation(number), ALL, num_answers=1) for number in range(6)] == [0, 1, 2, 0, 1, 2]
    place.release(1, num_answers=1)
    assert place.place(conversation(7), ALL, num_answers=1) == 1
    assert place.loads == [2, 2, 2]


def test_a_response_of_many_answers_weighs_as_many() -> None:
    place = Placement(2)
    assert place.place(conversation(1), (0, 1), num_answers=4) == 0
    assert [place.place(conversation(n), (0, 1), num_answers=1) for n in range(2, 6)] == [1, 1, 1, 1]


def test_a_later_turn_goes_where_the_first_went() -> None:
    place = Placement(3)
    homes = [place.place(conversation(number), ALL, num_answers=1) for number in range(3)]
    for engine in homes:
        place.release(engine, num_answers=1)
    for number in (2, 0, 1):
        engine = place.place(conversation(number, turns=2), ALL, num_answers=1)
        assert engine == homes[number]
        place.release(engine, num_answers=1)


def test_a_picture_says_more_than_words() -> None:
    place = Placement(2)
    place.place(make_request(range(70), tiles=["a"]), (0, 1), num_answers=1)
    place.place(make_request(range(100, 170), tiles=["b"]), (0, 1), num_answers=1)
    for engine in (0, 1):
        place.release(engine, num_answers=1)
    assert place.place(make_request(range(500, 570), tiles=["b"]), (0, 1), num_answers=1) == 1


def test_strangers_to_a_key_do_not_share_a_home() -> None:
    """Their caches are apart, so there is nothing to be found."""
    place = Placement(2)
    place.place(conversation(1, cache_salt="a"), (0, 1), num_answers=1)
    assert place.place(conversation(1, cache_salt="b"), (0, 1), num_answers=1) == 1


def test_a_home_that_has_too_much_is_left_and_the_new_one_is_the_home() -> None:
    place = Placement(2)
    taken = [place.place(conversation(1), (0, 1), num_answers=1) for _ in range(8)]
    assert max(place.loads) <= BOUND * 4, "a popular beginning crowds one engine"
    assert taken[0] == 0
    busy = taken[-1]
    place.loads[busy], place.loads[1 - busy] = 6, 0
    assert place.place(conversation(1), (0, 1), num_answers=1) == 1 - busy
    place.loads[:] = [0, 0]
    assert place.place(conversation(1), (0, 1), num_answers=1) == 1 - busy


def test_an_engine_that_is_gone_gets_nothing_and_its_conversations_move() -> None:
    place = Placement(2)
    assert place.place(conversation(1), (0, 1), num_answers=1) == 0
    assert place.place(conversation(1), (1,), num_answers=1) == 1
    place.release(0, num_answers=1)
    place.release(1, num_answers=1)
    assert place.place(conversation(1), (0, 1), num_answers=1) == 1


def test_no_engine_has_more_than_its_bound_whatever_comes() -> None:
    rng = random.Random(1)
    place = Placement(4)
    here: list[int] = []
    homes_kept = 0
    for _ in range(3000):
        if here and rng.random() < 0.45:
            place.release(here.pop(rng.randrange(len(here))), num_answers=1)
            continue
        before = list(place.loads)
        engine = place.place(conversation(min(int(rng.expovariate(0.4)), 20)), range(4), num_answers=1)
        assert before[engine] <= max(BOUND * (sum(before) + 1) / 4 - 1, min(before))
        homes_kept += before[engine] > min(before)
        here.append(engine)
    assert homes_kept > 100, "nobody went home to an engine that was not the idlest"
    assert min(place.loads) >= 0
    assert sum(place.loads) == len(here)


def test_old_homes_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "MAX_HOMES", 3)
    place = Placement(2)
    for number in range(10):
        place.release(place.place(conversation(number), (0, 1), num_answers=1), num_answers=1)
    assert len(place._homes) == 3
