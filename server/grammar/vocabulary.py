"""The model's vocabulary in the terms of the grammar library: what each token spells, and what may never come.

Knows bytes and bits; knows nothing of grammars.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from llguidance import LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

_WORD_BITS = 32
_SPACE = b" "


class VocabularySpec(msgspec.Struct, frozen=True, kw_only=True):
    """The vocabulary as plain data, which can also be sent to another process.

    token_bytes           [tokens] what each id spells. Ids from its end to `vocab_size` are padding and never allowed;
                          tokens from `vocab_size` on are left out
    special_token_ids     ids that are never text, whatever they spell
    eos_token_ids         ids that end an answer: one at least, all below `vocab_size`
    vocab_size            ids that the model has, and bits in a mask
    """

    token_bytes: Sequence[bytes]
    special_token_ids: frozenset[int]
    eos_token_ids: tuple[int, ...]
    vocab_size: int


class Vocabulary:
    """Tokens for the library, which knows them by bytes alone.

    The detokenizer drops the space that stands before an answer, so the first token `▁foo` is seen as `foo`. To know
    which such tokens may begin an answer, the library gets the tokens without their space as further ids, from `size`
    on, where no plain token spells the same.

    size                  ids that the model has, and bits in a mask
    eos_token_ids         ids that end an answer
    ll_tokenizer          the same vocabulary as an object of the library
    """

    def __init__(self, spec: VocabularySpec) -> None:
        """Raises ValueError for a spec whose `eos_token_ids` are none or out of range."""
        eos_token_ids, vocab_size = spec.eos_token_ids, spec.vocab_size
        if not eos_token_ids or not all(0 <= token_id < vocab_size for token_id in eos_token_ids):
            raise ValueError(f"{len(eos_token_ids)} ids end an answer; there must be one, below {vocab_size}")
        unusable = {*spec.special_token_ids, *eos_token_ids}
        known = [b"" if index in unusable else data for index, data in enumerate(spec.token_bytes[:vocab_size])]
        self.size = vocab_size
        self.eos_token_ids = eos_token_ids
        self._tokens = known + [b""] * (vocab_size - len(known))
        usable = [index for index, data in enumerate(self._tokens) if data]
        self._usable = pack_bits(_bits([*usable, *eos_token_ids], vocab_size))
        self._ends = pack_bits(_bits(eos_token_ids, vocab_size))
        self._bare_ids, extra = _without_space(self._tokens)
        # As arrays, for the mask of a first token: ids that begin with a space, and the library's ids without it.
        self._spaced = np.array(list(self._bare_ids), dtype=np.int64)
        self._bare = np.array(list(self._bare_ids.values()), dtype=np.int64)
        self._lone_spaces = np.array([i for i, data in enumerate(self._tokens) if data == _SPACE], dtype=np.int64)
        self._num_ll_words = num_words(vocab_size + len(extra))
        self.ll_tokenizer = LLTokenizer(_Tokens(self._tokens + extra, eos_token_ids[0]), eos_token=list(eos_token_ids))

    def is_usable(self, token_id: int) -> bool:
        """Whether an id can be part of a text: neither special nor padding nor out of range."""
        return 0 <= token_id < self.size and self._tokens[token_id] != b""

    def first_token(self, token_id: int) -> int | None:
        """The library's id of a usable token whose leading space is not seen; None if nothing is left of it."""
        if self._tokens[token_id] == _SPACE:
            return None
        return self._bare_ids.get(token_id, token_id)

    def allows_text(self, mask: NDArray[np.int32]) -> bool:
        """Whether a mask, as `mask` makes it, has anything but the end."""
        return bool((mask & ~self._ends).any())

    def empty_ll_mask(self) -> NDArray[np.int32]:
        """Words for the library to write a mask into."""
        return np.empty(self._num_ll_words, dtype=np.int32)

    def mask(self, ll_mask: NDArray[np.int32]) -> NDArray[np.int32]:
        """The model's part of a mask by the library: int32 words [ceil(size / 32)]."""
        return ll_mask[: len(self._usable)] & self._usable

    def first_mask(self, ll_mask: NDArray[np.int32]) -> NDArray[np.int32]:
        """The same for a first token, whose leading space is not seen."""
        by_bytes = expand_bitmask(ll_mask, _WORD_BITS * len(ll_mask))
        allowed = by_bytes[: self.size].copy()
        allowed[self._spaced] = by_bytes[self._bare]
        allowed[self._lone_spaces] = True
        return pack_bits(allowed) & self._usable


class _Tokens(TokenizerWrapper):
    """What the library asks of a tokenizer. It would encode text only to force tokens, which no grammar of ours does.

    Special tokens have no bytes here, so that the library can neither name them nor let them through.
    """

    def __init__(self, tokens: list[bytes], eos_token_id: int) -> None:
        self.is_tokenizer_wrapper = True
        self.tokens = tokens
        self.eos_token_id = eos_token_id
        self.bos_token_id = None
        self.special_token_ids = ()

    def __call__(self, text: str) -> list[int]:
        raise RuntimeError("no text is encoded for a grammar")


def _without_space(tokens: Sequence[bytes]) -> tuple[dict[int, int], list[bytes]]:
    """For each id of a space with more behind it the library's id of the rest; and what that needs beyond `tokens`."""
    ids = {data: index for index, data in enumerate(tokens) if data}
    bare_ids: dict[int, int] = {}
    extra: list[bytes] = []
    for index, data in enumerate(tokens):
        bare = data.removeprefix(_SPACE)
        if not bare or bare == data:
            continue
        if bare not in ids:
            ids[bare] = len(tokens) + len(extra)
            extra.append(bare)
        bare_ids[index] = ids[bare]
    return bare_ids, extra


def num_words(bits: int) -> int:
    return -(-bits // _WORD_BITS)


def expand_bitmask(words: NDArray[np.int32], size: int) -> NDArray[np.bool_]:
    """Bool [..., size] of int32 words [..., ceil(size / 32)], whose lowest bit comes first."""
    bits = np.unpackbits(words.view(np.uint8), axis=-1, count=size, bitorder="little")
    return bits.view(np.bool_)


def pack_bits(allowed: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Int32 words [ceil(size / 32)] of bool [size], the inverse of `expand_bitmask`."""
    packed = np.zeros(4 * num_words(len(allowed)), dtype=np.uint8)
    packed[: -(-len(allowed) // 8)] = np.packbits(allowed, bitorder="little")
    return packed.view(np.int32)


def _bits(ids: Sequence[int], size: int) -> NDArray[np.bool_]:
    bits = np.zeros(size, dtype=np.bool_)
    bits[list(ids)] = True
    return bits
