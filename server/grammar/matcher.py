"""One answer under a grammar: which tokens may come next, and where it may end.

Knows the library's state of a parse. Not safe to use from several threads at once; a fork is independent of its origin.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from server.errors import ClientError
from server.grammar.vocabulary import Vocabulary


class Matcher:
    """Allows exactly those tokens that keep the visible text a beginning of what the grammar describes.

    With `leading_space` a single space before the answer is not part of the visible text, and may be there or not.
    """

    def __init__(
        self,
        new_parser: Callable[[bool], LLMatcher],
        vocabulary: Vocabulary,
        *,
        leading_space: bool,
        param: str,
    ) -> None:
        """`new_parser` makes a parser at its start, given whether a used one has failed. `param` is for errors."""
        self._new_parser = new_parser
        self._parser = new_parser(False)
        self._vocabulary = vocabulary
        self._at_start = leading_space
        self._ended = False
        self._param = param
        self._consumed: list[int] = []

    def fork(self) -> Matcher:
        """A matcher in the same state that goes its own way."""
        twin = copy.copy(self)
        twin._parser = self._parser.deep_copy()
        twin._consumed = list(self._consumed)
        return twin

    @property
    def is_finished(self) -> bool:
        """True when nothing but the end may follow, or the end has come."""
        return self._ended or self._parser.is_stopped()

    def bitmask(self) -> NDArray[np.int32]:
        """The tokens that may come next, as int32 words [ceil(vocab_size / 32)] with the lowest bit first.

        Small to keep and to send to a device; `expand_bitmask` makes a bool of each. Where the answer is finished,
        those that end it. Raises ClientError when the grammar needs more work here than is allowed, or leads nowhere.
        """
        words = self._vocabulary.empty_ll_mask()
        self._parser.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._parser.is_error():
            self._start_again()
            self._parser.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            self._check()
        return self._vocabulary.first_mask(words) if self._at_start else self._vocabulary.mask(words)

    def advance(self, token_id: int) -> None:
        """Go on by a token. Raises ValueError, and stays as it is, when the mask did not allow it.

        Raises ClientError when the grammar needs more work here than is allowed.
        """
        if self._ended:
            raise ValueError("the answer has ended")
        if token_id in self._vocabulary.eos_token_ids:
            if not self._parser.is_accepting():
                raise ValueError(f"token {token_id} ends the answer where the grammar does not")
            self._ended = True
            return
        if not self._vocabulary.is_usable(token_id):
            raise ValueError(f"token {token_id} is no text")
        ll_id = self._vocabulary.first_token(token_id) if self._at_start else token_id
        if ll_id is not None:
            self._consume(ll_id, token_id)
        self._at_start = False

    def _consume(self, ll_id: int, token_id: int) -> None:
        consumed = self._parser.try_consume_tokens([ll_id])
        if self._parser.is_error():
            self._start_again()
            consumed = self._parser.try_consume_tokens([ll_id])
            self._check()
        if consumed != 1:
            raise ValueError(f"token {token_id} is not allowed by the grammar")
        self._consumed.append(ll_id)

    def _start_again(self) -> None:
        """Come to the same state with a new parser. Raises ClientError when that fails as well.

        Parsers of one grammar share the library's table of lexer states, which may be full because of other answers.
        """
        self._parser = self._new_parser(True)
        if self._consumed:
            self._parser.consume_tokens(self._consumed)
        self._check()

    def _check(self) -> None:
        if self._parser.is_error():
            # The library's own message may hold what the client sent.
            raise ClientError("the grammar is too complex here, or leads nowhere", param=self._param)
