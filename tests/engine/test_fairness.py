"""No key keeps another's requests waiting: neither by how many it has, nor by how long they run."""

from __future__ import annotations

import pytest

from server.engine.core import EngineCore
from server.types import EngineRequest, RequestOrigin
from tests.factories import expected_answer, make_core, make_request

Answers = dict[str, list[int]]


def ask(key: str, *, prompt: int = 8, max_tokens: int = 4) -> EngineRequest:
    # Prompts of their own, lest one key finds blocks of the other.
    start = 1000 if key == "b" else 100
    return make_request(range(start, start + prompt), max_tokens=max_tokens, origin=RequestOrigin(key=key))


def step(core: EngineCore, answers: Answers) -> None:
    for output in core.step().outputs:
        answers.setdefault(output.request_id, []).extend(output.new_token_ids)
    core.scheduler.check_integrity()


def steps_until_first_token(core: EngineCore, request: EngineRequest, answers: Answers) -> int:
    core.handle(request)
    for count in range(1, 200):
        step(core, answers)
        if answers.get(request.request_id):
            return count
    raise AssertionError("no token in 200 steps")


def finish(core: EngineCore, requests: list[EngineRequest], answers: Answers) -> None:
    while core.scheduler.has_work:
        step(core, answers)
    for request in requests:
        assert answers[request.request_id] == expected_answer(request)
    assert core.scheduler.holds_nothing


def flood(core: EngineCore, count: int, *, prompt: int = 8, max_tokens: int = 60) -> list[EngineRequest]:
    requests = [ask("a", prompt=prompt, max_tokens=max_tokens) for _ in range(count)]
    for request in requests:
        core.handle(request)
    return requests


def test_a_full_batch_of_one_key_makes_room_for_another() -> None:
    core, answers = make_core(max_num_seqs=4, num_blocks=200), Answers()
    requests = flood(core, 12)
    for _ in range(5):
        step(core, answers)
    request = ask("b")
    assert steps_until_first_token(core, request, answers) == 1
    finish(core, [*requests, request], answers)


def test_long_prompts_of_one_key_do_not_use_up_the_steps() -> None:
    core, answers = make_core(max_num_seqs=8, max_num_batched_tokens=16, num_blocks=400), Answers()
    requests = flood(core, 8, prompt=90, max_tokens=4)
    for _ in range(3):
        step(core, answers)
    request = ask("b", prompt=30)
    assert steps_until_first_token(core, request, answers) <= 3  # two chunks, and room for decodes
    finish(core, [*requests, request], answers)


def test_blocks_of_one_key_are_given_up_for_another() -> None:
    core, answers = make_core(max_num_seqs=16, num_blocks=32, max_model_len=120), Answers()
    requests = flood(core, 8, prompt=12, max_tokens=30)
    for _ in range(4):
        step(core, answers)
    request = ask("b", prompt=20)
    assert steps_until_first_token(core, request, answers) <= 4
    finish(core, [*requests, request], answers)


def test_the_last_place_of_a_key_is_its_own() -> None:
    """Nobody is sent back by a key that is no worse off."""
    core, answers = make_core(max_num_seqs=2, num_blocks=200), Answers()
    first = [ask("a", max_tokens=30), ask("b", max_tokens=30)]
    for request in first:
        core.handle(request)
    step(core, answers)
    others = [ask(key, max_tokens=3) for key in "cdabab"]
    for request in others:
        core.handle(request)
    while first[1].request_id not in answers or len(answers[first[1].request_id]) < 30:
        stats = core.step()
        for output in stats.outputs:
            answers.setdefault(output.request_id, []).extend(output.new_token_ids)
        assert stats.stats.num_preemptions == 0
    finish(core, [*first, *others], answers)


@pytest.mark.parametrize("keys", ["", "a"])
def test_one_key_alone_is_served_in_order_of_arrival(keys: str) -> None:
    core, answers = make_core(max_num_seqs=1, num_blocks=200), Answers()
    requests = [make_request(8, max_tokens=2, origin=RequestOrigin(key=keys)) for _ in range(6)]
    for request in requests:
        core.handle(request)
    finish(core, requests, answers)
    assert list(answers) == [request.request_id for request in requests]
