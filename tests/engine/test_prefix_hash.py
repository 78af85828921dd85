"""Same words with another picture must never share a block."""

from __future__ import annotations

from server.engine.prefix_hash import BlockHasher
from server.engine.request import Request
from server.types import EngineRequest, PlaceholderRange
from tests.factories import IMAGE_ID, make_request

HASHER = BlockHasher(4, secret=b"test")


def hashes(source: EngineRequest) -> list[bytes]:
    request = Request(source, 0)
    HASHER.extend(request, request.num_tokens)
    return request.block_hashes


def test_same_words_and_picture_give_same_hashes() -> None:
    first, second = hashes(make_request(30, tiles=["cat"])), hashes(make_request(30, tiles=["cat"]))
    assert first == second
    assert len(first) == len(make_request(30, tiles=["cat"]).prompt_token_ids) // 4


def test_another_picture_changes_every_block_from_its_own_on() -> None:
    cat, dog = hashes(make_request(30, tiles=["cat"])), hashes(make_request(30, tiles=["dog"]))
    assert not set(cat) & set(dog)  # the picture begins in the first block


def test_blocks_before_the_picture_are_shared_and_none_after() -> None:
    def request(tile: str) -> EngineRequest:
        base = make_request(2, tiles=[tile])
        shift = 10
        return EngineRequest(
            request_id=tile,
            prompt_token_ids=list(range(shift)) + base.prompt_token_ids,
            sampling=base.sampling,
            eos_token_ids=(),
            tiles=base.tiles,
            placeholders=tuple(type(p)(p.offset + shift, p.length) for p in base.placeholders),
        )

    cat, dog = hashes(request("cat")), hashes(request("dog"))
    shared = [a == b for a, b in zip(cat, dog, strict=True)]
    assert shared == [True, True, True, False]  # the picture's rows begin at token 12


def test_order_of_pictures_matters() -> None:
    ab, ba = hashes(make_request(6, tiles=["a", "b"])), hashes(make_request(6, tiles=["b", "a"]))
    assert not set(ab) & set(ba)


def test_salt_and_secret_separate() -> None:
    plain, salted = hashes(make_request(12)), hashes(make_request(12, cache_salt="tenant"))
    assert not set(plain) & set(salted)
    request = Request(make_request(12), 0)
    BlockHasher(4, secret=b"other").extend(request, 12)
    assert not set(plain) & set(request.block_hashes)


def test_incremental_equals_at_once() -> None:
    request = Request(make_request(30, tiles=["a", "b"]), 0)
    for length in range(request.num_tokens + 1):
        HASHER.extend(request, length)
    assert request.block_hashes == hashes(make_request(30, tiles=["a", "b"]))


def test_where_a_picture_stands_matters_even_where_the_ids_do_not_tell() -> None:
    def request(offset: int) -> EngineRequest:
        whole = make_request(4, tiles=["a"])
        return EngineRequest(
            request_id="r",
            prompt_token_ids=[IMAGE_ID] * 12,
            sampling=whole.sampling,
            eos_token_ids=(),
            tiles=whole.tiles,
            placeholders=(PlaceholderRange(offset, 4),),
        )

    assert len({hashes(request(offset))[1] for offset in range(9)}) == 9


def test_a_picture_counts_in_every_block_it_reaches_into() -> None:
    """Also for two requests whose blocks before it are the same to the last bit."""
    request = Request(make_request(4, tiles=["a"], rows_per_tile=11), 0)
    other = Request(make_request(4, tiles=["b"], rows_per_tile=11), 0)
    assert request.token_ids == other.token_ids
    for start, end in ((0, 4), (4, 8), (8, 12), (12, 16)):  # rows 2 to 12
        same = HASHER._hash_block(request, start, b"parent") == HASHER._hash_block(other, start, b"parent")
        assert not same, f"tokens {start} to {end}"
    assert HASHER._hash_block(request, 13, b"parent") == HASHER._hash_block(other, 13, b"parent")
