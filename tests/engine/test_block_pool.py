from __future__ import annotations

import pytest

from server.engine.block_pool import BlockPool


def test_allocate_release_and_exhaustion() -> None:
    pool = BlockPool(4)
    first = pool.allocate(3)
    assert first is not None
    assert pool.allocate(2) is None
    assert pool.num_free == 1
    pool.release(first)
    assert pool.num_free == 4
    pool.check_integrity()


def test_a_published_block_is_found_until_it_is_handed_out() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.publish(blocks[0], b"h0")
    pool.publish(blocks[1], b"h1")
    pool.release(blocks)
    assert pool.lookup([b"h0", b"h1"]) == blocks
    assert pool.lookup([b"h1"]) == [blocks[1]]
    # The tail of a prefix goes first: the head alone is still worth something.
    assert pool.allocate(1) == [blocks[1]]
    assert pool.lookup([b"h0", b"h1"]) == [blocks[0]]
    pool.check_integrity()


def test_blocks_without_a_hash_are_handed_out_before_cached_ones() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    assert blocks is not None
    pool.publish(blocks[0], b"h0")
    pool.release(blocks)
    assert set(pool.allocate(2) or []) == set(blocks[1:])
    assert pool.lookup([b"h0"]) == [blocks[0]]


def test_acquire_shares_and_takes_free_blocks_back() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.publish(blocks[0], b"h")
    pool.acquire(blocks)
    assert pool.ref_count(blocks[0]) == 2
    pool.release(blocks)
    pool.release(blocks)
    assert pool.num_free == 2
    pool.acquire(pool.lookup([b"h"]))
    assert pool.num_free == 1
    pool.check_integrity()


def test_the_first_block_published_under_a_hash_stays() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(1), pool.allocate(1)
    assert first is not None
    assert second is not None
    pool.publish(first[0], b"h")
    pool.publish(second[0], b"h")
    assert pool.lookup([b"h"]) == first
    pool.release(second)
    pool.check_integrity()


def test_double_release_is_refused() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    assert blocks is not None
    pool.release(blocks)
    with pytest.raises(ValueError, match="more often"):
        pool.release(blocks)


def test_integrity_check_sees_a_leak() -> None:
    pool = BlockPool(2)
    pool.allocate(1)
    pool._ref_counts[0] = 0
    with pytest.raises(RuntimeError):
        pool.check_integrity()


def test_a_block_without_a_hash_goes_before_cached_ones_that_were_freed_long_ago() -> None:
    pool = BlockPool(3)
    cached, plain = pool.allocate(2), pool.allocate(1)
    assert cached is not None
    assert plain is not None
    for block, block_hash in zip(cached, (b"h0", b"h1"), strict=True):
        pool.publish(block, block_hash)
    pool.release(cached)
    pool.release(plain)
    assert pool.allocate(1) == plain
    assert pool.lookup([b"h0", b"h1"]) == cached


def test_a_prefix_ends_at_the_first_block_that_is_gone() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    assert blocks is not None
    for block, block_hash in zip(blocks, (b"h0", b"h1", b"h2"), strict=True):
        pool.publish(block, block_hash)
    assert pool.lookup([b"h0", b"other", b"h2"]) == blocks[:1]
    assert pool.lookup([b"other", b"h1"]) == []


def test_how_many_of_some_blocks_are_free() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    assert blocks is not None
    pool.release(blocks[:2])
    assert pool.num_free_among(blocks) == 2
    assert pool.num_used == 1
