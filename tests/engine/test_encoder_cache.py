from __future__ import annotations

from server.engine.encoder_cache import EncoderCache


def test_pinned_tiles_stay_and_unpinned_ones_go_oldest_first() -> None:
    cache = EncoderCache(2)
    a, b = cache.pin(b"a"), cache.pin(b"b")
    assert {a, b} == {0, 1}
    assert cache.pin(b"c") is None
    assert cache.num_available == 0
    cache.unpin(b"b")
    cache.unpin(b"a")
    assert b"a" in cache
    assert cache.pin(b"c") == b  # b was unpinned first
    assert b"b" not in cache
    assert cache.pin(b"a") == a  # still there: a hit
    cache.check_integrity()


def test_shared_tile_is_pinned_until_its_last_user_is_done() -> None:
    cache = EncoderCache(1)
    assert cache.pin(b"a") == cache.pin(b"a") == 0
    cache.unpin(b"a")
    assert cache.pin(b"b") is None
    cache.unpin(b"a")
    assert cache.pin(b"b") == 0
    cache.check_integrity()


def test_discard_forgets_only_what_nobody_uses() -> None:
    cache = EncoderCache(1)
    cache.pin(b"a")
    cache.discard(b"a")
    assert b"a" in cache
    cache.unpin(b"a")
    cache.discard(b"a")
    assert b"a" not in cache
    assert cache.num_available == 1
    cache.check_integrity()
