from __future__ import annotations

import pytest

from server.engine.encoder_cache import EncoderCache


def encode(cache: EncoderCache, key: bytes) -> bool:
    """Encode a tile in one go; False if there is no slot for it."""
    if not cache.begin("r", 0, key, 10):
        return False
    cache.advance(10)
    cache.check_integrity()
    return True


def test_pinned_tiles_stay_and_unpinned_ones_go_oldest_first() -> None:
    cache = EncoderCache(2)
    assert encode(cache, b"a")
    assert encode(cache, b"b")
    a, b = cache.pin(b"a"), cache.pin(b"b")
    assert {a, b} == {0, 1}
    assert not encode(cache, b"c")
    assert cache.num_available == 0
    cache.unpin(b"b")
    cache.unpin(b"a")
    assert b"a" in cache
    assert encode(cache, b"c")
    assert cache.pin(b"c") == b  # b was unpinned first
    assert b"b" not in cache
    assert cache.pin(b"a") == a  # still there: a hit
    cache.check_integrity()


def test_shared_tile_is_pinned_until_its_last_user_is_done() -> None:
    cache = EncoderCache(1)
    encode(cache, b"a")
    assert cache.pin(b"a") == cache.pin(b"a") == 0
    cache.unpin(b"a")
    assert not encode(cache, b"b")
    cache.unpin(b"a")
    assert encode(cache, b"b")
    assert cache.pin(b"b") == 0
    cache.check_integrity()


def test_discard_forgets_only_what_nobody_uses() -> None:
    cache = EncoderCache(1)
    encode(cache, b"a")
    cache.pin(b"a")
    cache.discard(b"a")
    assert b"a" in cache
    cache.unpin(b"a")
    cache.discard(b"a")
    assert b"a" not in cache
    assert cache.num_available == 1
    cache.check_integrity()


def test_a_tile_is_here_when_its_last_pixel_is_and_not_before() -> None:
    cache = EncoderCache(1)
    assert cache.begin("r", 0, b"a", 10)
    for _ in range(2):
        cache.advance(4)
        assert b"a" not in cache
        assert cache.num_available == 0
        cache.check_integrity()
    with pytest.raises(ValueError, match="partial already"):
        cache.begin("r", 1, b"b", 10)
    cache.advance(2)
    assert b"a" in cache
    assert cache.partial is None
    with pytest.raises(ValueError, match="partial already, or here"):
        cache.begin("r", 0, b"a", 10)
    cache.check_integrity()


def test_a_partial_tile_goes_with_the_request_it_was_begun_for_or_with_its_content() -> None:
    cache = EncoderCache(1)
    for let_go in (lambda: cache.abandon("r"), lambda: cache.discard(b"a")):
        assert cache.begin("r", 0, b"a", 10)
        cache.abandon("another")
        cache.discard(b"another")
        assert cache.partial is not None
        let_go()
        assert cache.partial is None
        assert cache.num_available == 1
        assert b"a" not in cache
        cache.check_integrity()


def test_a_touched_tile_outlives_those_that_are_not() -> None:
    cache = EncoderCache(2)
    encode(cache, b"a")
    encode(cache, b"b")
    cache.touch(b"a")
    cache.touch(b"unknown")
    encode(cache, b"c")
    assert b"a" in cache
    assert b"b" not in cache
