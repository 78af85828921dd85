"""A stand-in for a model: it picks tokens that a matcher allows, and tells what a client would see of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from server.grammar.compiler import GrammarCompiler
from server.grammar.matcher import Matcher
from server.grammar.vocabulary import VocabularySpec, expand_bitmask
from server.outputs.detokenizer import Detokenizer, TokenTable
from server.types import GrammarSpec


@dataclass(frozen=True)
class Model:
    """A vocabulary; ids from the end of `table` to `vocab_size` are padding."""

    table: TokenTable
    eos_token_ids: tuple[int, ...]
    vocab_size: int

    @property
    def vocabulary(self) -> VocabularySpec:
        return VocabularySpec(
            token_bytes=self.table.token_bytes,
            special_token_ids=self.table.special_ids,
            eos_token_ids=self.eos_token_ids,
            vocab_size=self.vocab_size,
        )

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """An id of each ordinary token's bytes."""
        pairs = enumerate(self.table.token_bytes)
        return {data: index for index, data in pairs if data and index not in self.table.special_ids}

    @cached_property
    def closing(self) -> NDArray[np.bool_]:
        """[vocab_size] the tokens that bring JSON nearer to its end."""
        closing = {index for data, index in self.ids.items() if set(data) <= set(b'"}],')}
        return np.isin(np.arange(self.vocab_size), [*closing, *self.eos_token_ids])

    def spell(self, text: str | bytes) -> list[int]:
        """Ids whose bytes are a text, a byte each."""
        data = text.encode() if isinstance(text, str) else text
        return [self.ids[data[index : index + 1]] for index in range(len(data))]

    def visible(self, token_ids: Sequence[int]) -> str:
        """What a client sees of an answer that begins a text."""
        detokenizer = Detokenizer(self.table, skip_special_tokens=True)
        return detokenizer.push(token_ids) + detokenizer.flush()

    def written(self, token_ids: Sequence[int]) -> bytes:
        """All bytes of an answer that continues a text."""
        return b"".join(self.table.get(token_id) for token_id in token_ids if token_id not in self.table.special_ids)


def schema_spec(schema: object) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(schema, separators=(",", ":")), "response_format")


def start(compiler: GrammarCompiler, spec: GrammarSpec, *, leading_space: bool = True) -> Matcher:
    return compiler.compile(spec, leading_space=leading_space)


def allowed(matcher: Matcher, model: Model) -> NDArray[np.int64]:
    return np.flatnonzero(expand_bitmask(matcher.bitmask(), model.vocab_size))


def walk(matcher: Matcher, model: Model, chance: random.Random, *, closing: float, most: int) -> Iterator[int]:
    """Advance `matcher` by random tokens until it ends or `most` have come, telling each.

    With probability `closing` a token is drawn from the closing ones, if any is allowed.
    """
    for _ in range(most):
        mask = expand_bitmask(matcher.bitmask(), model.vocab_size)
        choices = np.flatnonzero(mask & model.closing) if chance.random() < closing else np.flatnonzero(mask)
        if not len(choices):
            choices = np.flatnonzero(mask)
        token_id = int(choices[chance.randrange(len(choices))])
        matcher.advance(token_id)
        yield token_id
        if token_id in model.eos_token_ids:
            return


def accepts(matcher: Matcher, token_ids: Sequence[int], model: Model) -> bool:
    """Whether an answer of these ids may end there, by masks alone; nothing is said of `matcher` afterwards."""
    for token_id in [*token_ids, model.eos_token_ids[0]]:
        if token_id not in allowed(matcher, model):
            return False
        matcher.advance(token_id)
    return True
