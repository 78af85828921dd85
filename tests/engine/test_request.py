from __future__ import annotations

import msgspec

from server.engine.request import Request, RequestStatus, split_choices
from server.types import FinishReason
from tests.factories import make_request


def test_a_new_request_has_all_before_it() -> None:
    request = Request(make_request(8), 3)
    assert request.status is RequestStatus.WAITING
    assert (request.num_tokens, request.num_prompt_tokens, request.num_output_tokens) == (8, 8, 0)
    assert (request.num_computed_tokens, request.num_uncomputed_tokens) == (0, 8)
    assert request.finish_reason is request.stop_token_id is request.first_scheduled_time is None


def test_its_tokens_are_its_own() -> None:
    source = make_request(8)
    Request(source, 0).append(5)
    assert len(source.prompt_token_ids) == 8


def test_rank_is_priority_then_arrival() -> None:
    requests = [Request(make_request(4, priority=priority), order) for order, priority in enumerate((0, 1, -1, 0))]
    assert sorted(requests, key=lambda request: request.rank) == [requests[index] for index in (2, 0, 3, 1)]


def test_tokens_count_until_the_cap() -> None:
    request = Request(make_request(8, max_tokens=2), 0)
    request.append(5)
    assert (request.num_output_tokens, request.finish_reason) == (1, None)
    request.append(6)
    assert (request.num_output_tokens, request.finish_reason) == (2, FinishReason.LENGTH)
    assert request.token_ids[-2:] == [5, 6]
    assert request.stop_token_id is None
    assert request.num_uncomputed_tokens == 10


def test_an_id_that_ends_is_a_stop_even_at_the_cap() -> None:
    request = Request(make_request(8, max_tokens=1, eos=(2, 9)), 0)
    request.append(9)
    assert (request.finish_reason, request.stop_token_id) == (FinishReason.STOP, 9)


def test_ignored_eos_still_ends_where_it_is_also_a_stop_id() -> None:
    request = Request(make_request(8, eos=(2,), ignore_eos=True), 0)
    request.append(2)
    assert request.finish_reason is None
    request = Request(make_request(8, eos=(2,), ignore_eos=True, stop_token_ids=(2,)), 0)
    request.append(2)
    assert (request.finish_reason, request.stop_token_id) == (FinishReason.STOP, 2)


def test_a_complete_grammar_is_a_stop_without_a_stop_token() -> None:
    request = Request(make_request(8, ignore_eos=True), 0)
    request.append(7, is_complete=True)
    assert (request.finish_reason, request.stop_token_id) == (FinishReason.STOP, None)


def test_choices_have_ids_and_seeds_of_their_own_and_the_first_has_the_requests() -> None:
    source = make_request(8, n=3, seed=5, num_prompt_logprobs=0, num_logprobs=2)
    choices = split_choices(source)
    assert choices[0] is source
    assert tuple(choice.request_id for choice in choices) == source.choice_ids
    assert len(set(source.choice_ids)) == 3
    assert len({choice.sampling.seed for choice in choices}) == 3
    assert choices == split_choices(source)
    assert [choice.sampling.num_prompt_logprobs for choice in choices] == [0, None, None]
    assert [choice.sampling.num_logprobs for choice in choices] == [2, 2, 2]


def test_equal_answers_are_one_choice() -> None:
    greedy = msgspec.structs.replace(make_request(8), n=3)
    assert split_choices(greedy) == [greedy]
