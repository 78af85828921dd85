"""The books of the caches against what requests say that they hold; for tests and debugging, too slow for each step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from server.engine.encoder_cache import EncoderCache
from server.engine.kv_cache_manager import KVCacheManager
from server.engine.request import Request


def check_books(kv: KVCacheManager, encoder: EncoderCache, requests: Iterable[Request]) -> None:
    """Raise RuntimeError unless every block and slot is accounted for by exactly these requests."""
    kv.pool.check_integrity()
    encoder.check_integrity()
    holders: Counter[int] = Counter()
    pins: Counter[bytes] = Counter()
    for request in requests:
        holders.update(request.block_ids)
        pins.update(request.source.tiles[index].key for index in request.tile_slots)
    for block_id in range(kv.pool.num_blocks):
        if kv.pool.ref_count(block_id) != holders[block_id]:
            raise RuntimeError(f"block {block_id} is counted {kv.pool.ref_count(block_id)} times")
    if encoder.pin_counts() != pins:
        raise RuntimeError("encoder slots are pinned for requests that are gone")
