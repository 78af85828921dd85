from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.grammar.vocabulary import Vocabulary, VocabularySpec, expand_bitmask, pack_bits

TOKENS = [b"<s>", b" ", b" a", b"a", b" b", b"</s>", b"<image>", b"ab"]
SPEC = VocabularySpec(token_bytes=TOKENS, special_token_ids=frozenset({0, 5, 6}), eos_token_ids=(5,), vocab_size=40)


def make(**changes: object) -> Vocabulary:
    return Vocabulary(msgspec.structs.replace(SPEC, **changes))


@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_packing_and_expanding_are_inverse(bits: list[bool]) -> None:
    allowed = np.array(bits)
    words = pack_bits(allowed)
    assert words.dtype == np.int32
    assert len(words) == -(-len(bits) // 32)
    assert expand_bitmask(words, len(bits)).tolist() == bits
    assert not expand_bitmask(words, 32 * len(words))[len(bits) :].any()
    # As a device would expand it: the lowest bit of a word comes first.
    assert [bool(int(words[index // 32]) >> (index % 32) & 1) for index in range(len(bits))] == bits


def test_a_batch_of_masks_expands_row_by_row() -> None:
    rows = np.stack([pack_bits(np.arange(40) == index) for index in (0, 31, 32, 39)])
    assert expand_bitmask(rows, 40).nonzero()[1].tolist() == [0, 31, 32, 39]


def test_only_text_is_usable() -> None:
    vocabulary = make()
    assert [index for index in range(-1, 50) if vocabulary.is_usable(index)] == [1, 2, 3, 4, 7]


def test_masks_never_hold_special_tokens_or_padding() -> None:
    vocabulary = make()
    everything = np.full_like(vocabulary.empty_ll_mask(), -1)
    for mask in (vocabulary.mask(everything), vocabulary.first_mask(everything)):
        assert mask.shape == (2,)
        assert np.flatnonzero(expand_bitmask(mask, 64)).tolist() == [1, 2, 3, 4, 5, 7]
        assert vocabulary.allows_text(mask)


def test_a_mask_of_the_end_alone_allows_no_text() -> None:
    vocabulary = make()
    words = np.zeros_like(vocabulary.empty_ll_mask())
    assert not vocabulary.allows_text(vocabulary.mask(words))
    words[0] = 1 << 5
    assert not vocabulary.allows_text(vocabulary.mask(words))
    words[0] |= 1 << 3
    assert vocabulary.allows_text(vocabulary.mask(words))


def test_a_first_token_counts_without_its_space() -> None:
    vocabulary = make()
    assert vocabulary.first_token(2) == 3  # " a" is seen as "a", which has an id
    assert vocabulary.first_token(4) == 40  # " b" as "b", which has none: one beyond the vocabulary
    assert vocabulary.first_token(1) is None
    assert vocabulary.first_token(7) == 7
    words = np.zeros_like(vocabulary.empty_ll_mask())
    words[1] = 1 << 8  # id 40: "b" may come
    assert np.flatnonzero(expand_bitmask(vocabulary.first_mask(words), 40)).tolist() == [1, 4]
    words[:] = [1 << 3, 0]  # "a" may come, and so may " a"
    assert np.flatnonzero(expand_bitmask(vocabulary.first_mask(words), 40)).tolist() == [1, 2, 3]
    words[:] = [1 << 2, 0]  # " a" may come, but would be seen as "a"
    assert np.flatnonzero(expand_bitmask(vocabulary.first_mask(words), 40)).tolist() == [1]


def test_more_tokens_than_logits_are_cut_off() -> None:
    vocabulary = make(vocab_size=7)
    assert not vocabulary.is_usable(7)
    assert len(vocabulary.mask(np.full_like(vocabulary.empty_ll_mask(), -1))) == 1


@pytest.mark.parametrize("ends", [(), (40,), (-1,)])
def test_an_answer_must_be_able_to_end(ends: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="end an answer"):
        make(eos_token_ids=ends)
