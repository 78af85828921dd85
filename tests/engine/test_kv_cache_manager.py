from __future__ import annotations

import pytest

from server.engine.kv_cache_manager import KVCacheManager
from server.engine.request import Request
from tests.factories import make_request


def make_manager(num_blocks: int = 16, *, block_size: int = 4, caching: bool = True) -> KVCacheManager:
    return KVCacheManager(num_blocks=num_blocks, block_size=block_size, enable_prefix_caching=caching)


def make(prompt: int = 10, *, start: int = 100) -> Request:
    return Request(make_request(range(start, start + prompt)), 0)


def compute(manager: KVCacheManager, request: Request, num_tokens: int) -> None:
    """Take blocks for so many more tokens, and publish as after a step."""
    assert manager.extend(request, num_tokens) is not None
    request.num_computed_tokens += num_tokens
    manager.publish(request)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (8, 2)])
def test_blocks_for_tokens(tokens: int, blocks: int) -> None:
    assert make_manager().num_blocks_for(tokens) == blocks


def test_extending_takes_only_what_is_missing() -> None:
    manager, request = make_manager(4), make(14)
    first = manager.extend(request, 5)
    assert first is not None
    assert len(first) == 2
    request.num_computed_tokens = 5
    assert manager.extend(request, 3) == []
    more = manager.extend(request, 4)
    assert more is not None
    assert request.block_ids == first + more
    request.num_computed_tokens = 9
    assert manager.extend(request, 8) is None
    assert len(request.block_ids) == 3
    assert manager.pool.num_free == 1


def test_full_blocks_are_found_and_the_last_token_is_left_to_compute() -> None:
    manager, first = make_manager(), make(9)
    compute(manager, first, 9)
    for length, blocks in ((4, 0), (5, 1), (8, 1), (9, 2), (13, 2)):
        assert manager.find_prefix(make(length)) == first.block_ids[:blocks], length
    assert manager.find_prefix(make(9, start=200)) == []


def test_a_block_is_published_when_it_is_computed_and_not_before() -> None:
    manager, first = make_manager(), make(9)
    assert manager.extend(first, 9) is not None
    assert manager.find_prefix(make(9)) == []
    first.num_computed_tokens = 7
    manager.publish(first)
    assert manager.find_prefix(make(9)) == first.block_ids[:1]
    first.num_computed_tokens = 8
    manager.publish(first)
    manager.publish(first)
    assert manager.find_prefix(make(9)) == first.block_ids[:2]


def test_answers_are_published_too() -> None:
    manager, first = make_manager(), make(7)
    compute(manager, first, 7)
    first.append(50)
    compute(manager, first, 1)
    follow_up = Request(make_request([*range(100, 107), 50, 60]), 1)
    assert manager.find_prefix(follow_up) == first.block_ids[:2]


def test_without_caching_only_answers_to_the_same_prompt_find_its_blocks() -> None:
    manager, first = make_manager(caching=False), make(9)
    compute(manager, first, 9)
    assert manager.find_prefix(make(9)) == []
    sibling = Request(make_request(9), 1, group=first.request_id)
    assert manager.find_prefix(sibling) == first.block_ids[:2]


def test_starting_from_a_prefix_shares_its_blocks() -> None:
    manager, first, second = make_manager(), make(9), make(11)
    compute(manager, first, 9)
    prefix = manager.find_prefix(second)
    manager.start(second, prefix)
    assert (second.block_ids, second.num_computed_tokens) == (prefix, 8)
    assert all(manager.pool.ref_count(block) == 2 for block in prefix)
    compute(manager, second, 3)
    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.block_ids[2] != first.block_ids[2]
    manager.free(first)
    assert second.block_ids == [*prefix, second.block_ids[2]]
    manager.free(second)
    assert manager.pool.num_used == 0
    assert (second.block_ids, second.num_published_blocks) == ([], 0)
    manager.start(first, prefix)
    with pytest.raises(ValueError, match="holds blocks"):
        manager.start(first, prefix)


def test_publishing_goes_on_after_a_prefix_was_reused() -> None:
    manager, first, second = make_manager(), make(9), make(17)
    compute(manager, first, 9)
    manager.start(second, manager.find_prefix(second))
    compute(manager, second, 9)
    assert manager.find_prefix(make(17)) == second.block_ids[:4]
    manager.pool.check_integrity()


def test_admission_counts_all_tokens_a_reserve_and_what_a_prefix_would_take_from_the_free() -> None:
    manager = make_manager(4)
    request = make(12)
    assert manager.can_admit(request, [], spare=1)
    assert not manager.can_admit(request, [], spare=2)
    first = make(9)
    compute(manager, first, 9)  # holds three of four blocks
    prefix = manager.find_prefix(request)
    assert len(prefix) == 2
    assert manager.can_admit(request, prefix, spare=0)  # shares two, needs one
    assert not manager.can_admit(request, prefix, spare=1)
    manager.free(first)  # the prefix's blocks are free themselves now: four free, two of them the prefix
    assert manager.can_admit(request, prefix, spare=1)
    assert not manager.can_admit(request, prefix, spare=2)


def test_a_freed_prefix_is_found_again_after_its_request_has_gone() -> None:
    manager, first = make_manager(4), make(9)
    compute(manager, first, 9)
    blocks = list(first.block_ids)
    manager.free(first)
    assert manager.find_prefix(make(9)) == blocks[:2]
    other = make(8, start=500)
    compute(manager, other, 8)  # two free blocks without a prefix are there, and are taken first
    assert manager.find_prefix(make(9)) == blocks[:2]
    third = make(4, start=700)
    compute(manager, third, 4)
    assert manager.find_prefix(make(9)) == blocks[:1]  # the tail of a prefix goes before its head
