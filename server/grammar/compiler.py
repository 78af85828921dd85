"""From a client's grammar to a matcher of answers, with a cache of those seen last.

Knows the library's limits and errors; knows nothing of requests. Safe to use from several threads. The library is
native code and recursive: a source from a stranger must have passed `GrammarChecker`, or it may take long or crash.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict

from llguidance import LLMatcher, LLParserLimits

from server.errors import ClientError
from server.grammar.matcher import Matcher
from server.grammar.sources import KINDS, to_library_grammar
from server.grammar.vocabulary import Vocabulary, VocabularySpec
from server.types import GrammarSpec

CACHED_GRAMMARS = 64

# The library's own measures of work. `step_…` bound one mask or token, `initial_…` and `…_size` a compilation.
LIMITS = LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=25_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    precompute_large_lexemes=False,  # takes unbounded time
    verbose_errors=False,
)

_TOO_COMPLEX = "it is too large or too complex"
# What the library's message begins with or holds, and what is said to the client instead.
_REASONS = tuple(
    (re.compile(pattern), reason)
    for pattern, reason in (
        (r"Unsatisfiable schema|NoExtension", "no value satisfies it"),
        (r"circular references", "references that form a circle have other keywords beside them"),
        (r"oneOf constraints", "oneOf is supported only where its alternatives clearly exclude each other"),
        (r"min/maxProperties", "minProperties and maxProperties need every property in `properties` to be required"),
        (r"patternProperty regexes", "patternProperties are supported only where the patterns exclude each other"),
        (r"look-?around", "lookaround and anchors within a pattern are not supported"),
        (r"backreferences", "backreferences are not supported"),
        (r"too big|too large|too many|too deep|[Ll]imit|exceeded|fuel|too complex", _TOO_COMPLEX),
        (r"regex", "a regular expression in it is not valid"),
    )
)


class GrammarCompiler:
    """Compiles grammars for one vocabulary."""

    def __init__(self, vocabulary: VocabularySpec) -> None:
        """Raises ValueError as `Vocabulary` does."""
        self._vocabulary = Vocabulary(vocabulary)
        self._cache: OrderedDict[bytes, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, spec: GrammarSpec, *, leading_space: bool) -> Matcher:
        """A matcher at the start of an answer.

        `leading_space` is for an answer that begins a text of its own: one space before it is not seen and may be
        there or not. Raises ClientError with `spec.param` for what is malformed, not supported or too complex.
        """
        key = hashlib.sha256(f"{spec.kind}:{spec.source}".encode("utf-8", "surrogatepass")).digest()

        def new_parser(renew: bool) -> LLMatcher:
            return self._prototype(key, spec, renew=renew).deep_copy()

        return Matcher(new_parser, self._vocabulary, leading_space=leading_space, param=spec.param)

    def _prototype(self, key: bytes, spec: GrammarSpec, *, renew: bool) -> LLMatcher:
        """A parser at its start, to be copied: that of the cache, unless there is none or it is to be renewed."""
        with self._lock:
            if not renew and key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        prototype = self._parse(spec)
        with self._lock:
            self._cache[key] = prototype
            self._cache.move_to_end(key)
            if len(self._cache) > CACHED_GRAMMARS:
                self._cache.popitem(last=False)
        return prototype

    def _parse(self, spec: GrammarSpec) -> LLMatcher:
        grammar = to_library_grammar(spec)
        parser = LLMatcher(self._vocabulary.ll_tokenizer, grammar, log_level=0, limits=LIMITS)
        if parser.is_error():
            raise ClientError(f"{KINDS[spec.kind]} is not supported: {_reason(parser.get_error())}", param=spec.param)
        words = self._vocabulary.empty_ll_mask()
        first = parser.deep_copy()
        first.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if first.is_error():
            raise ClientError(f"{KINDS[spec.kind]} is not supported: {_reason(first.get_error())}", param=spec.param)
        if not self._vocabulary.allows_text(self._vocabulary.mask(words)):
            raise ClientError(f"{KINDS[spec.kind]} allows no text", param=spec.param)
        return parser


def _reason(message: str) -> str:
    """Our words for an error of the library, whose own may repeat the client's."""
    return next((reason for pattern, reason in _REASONS if pattern.search(message)), "it cannot be compiled")
