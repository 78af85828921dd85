from __future__ import annotations

import random

import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits

from server.errors import ClientError
from server.grammar import compiler as compiler_module
from server.grammar.compiler import GrammarCompiler
from server.types import GrammarSpec
from tests.grammar.walks import Model, allowed, schema_spec, start, walk

OBJECT = schema_spec({"type": "object"})
LETTERS = GrammarSpec("regex", "[a-c]{2}", "structured_outputs.regex")


def feed(matcher: object, token_ids: list[int]) -> None:
    for token_id in token_ids:
        matcher.advance(token_id)  # type: ignore[attr-defined]


def test_a_mask_is_words_of_the_whole_vocabulary(compiler: GrammarCompiler, model: Model) -> None:
    mask = start(compiler, OBJECT).bitmask()
    assert mask.dtype == np.int32
    assert mask.shape == (-(-model.vocab_size // 32),)


def test_masks_are_independent_arrays(compiler: GrammarCompiler, model: Model) -> None:
    matcher = start(compiler, LETTERS)
    first = matcher.bitmask()
    kept = first.copy()
    feed(matcher, model.spell("ab"))
    assert matcher.bitmask().tolist() != kept.tolist()
    assert first.tolist() == kept.tolist()


def test_the_end_is_allowed_where_the_text_may_end_and_only_there(compiler: GrammarCompiler, model: Model) -> None:
    matcher = start(compiler, GrammarSpec("regex", "ab?"))
    ends = set(model.eos_token_ids)
    assert not ends & set(allowed(matcher, model))
    for end in ends:
        with pytest.raises(ValueError, match="ends the answer"):
            matcher.fork().advance(end)
    feed(matcher, model.spell("a"))
    assert ends < set(allowed(matcher, model))
    assert not matcher.is_finished
    for end in ends:
        ended = matcher.fork()
        ended.advance(end)
        assert ended.is_finished
        with pytest.raises(ValueError, match="has ended"):
            ended.advance(model.ids[b"b"])
    feed(matcher, model.spell("b"))
    assert set(allowed(matcher, model)) == ends
    assert matcher.is_finished


def test_special_tokens_and_padding_are_never_allowed(compiler: GrammarCompiler, model: Model) -> None:
    never = {*model.table.special_ids, *range(len(model.table.token_bytes), model.vocab_size)} - set(
        model.eos_token_ids
    )
    assert {0, 1, 32000, 32001, 32003, model.vocab_size - 1} <= never
    for leading_space in (True, False):
        matcher = start(compiler, GrammarSpec("regex", "(?s:.*)"), leading_space=leading_space)
        for text in ("", "<", "<image", "é"):
            feed(matcher, model.spell(text))
            assert len(allowed(matcher, model)) > 30_000
            assert not never & set(allowed(matcher, model))
            for token_id in never:
                with pytest.raises(ValueError, match="is no text"):
                    matcher.advance(token_id)


@pytest.mark.parametrize("token_id", [-1, -32000, 32064, 1 << 40])
def test_an_id_out_of_range_is_refused(compiler: GrammarCompiler, token_id: int) -> None:
    with pytest.raises(ValueError, match="is no text"):
        start(compiler, OBJECT).advance(token_id)


def test_a_refused_token_changes_nothing(compiler: GrammarCompiler, model: Model) -> None:
    for leading_space in (True, False):
        matcher = start(compiler, LETTERS, leading_space=leading_space)
        for text in ("", "a"):
            feed(matcher, model.spell(text))
            before = matcher.bitmask().tolist()
            for token in (b"x", b"abc", b" x", "é".encode(), b"\xe2"):
                with pytest.raises(ValueError, match="not allowed"):
                    matcher.advance(model.ids[token])
                with pytest.raises(ValueError, match="ends the answer"):
                    matcher.advance(model.eos_token_ids[0])
            assert matcher.bitmask().tolist() == before


def test_a_fork_goes_its_own_way(compiler: GrammarCompiler, model: Model) -> None:
    matcher = start(compiler, LETTERS)
    matcher.advance(model.ids[b"a"])
    fork = matcher.fork()
    before = matcher.bitmask().tolist()
    assert fork.bitmask().tolist() == before
    feed(fork, [model.ids[b"b"], model.eos_token_ids[1]])
    assert fork.is_finished
    assert fork.fork().is_finished
    with pytest.raises(ValueError, match="has ended"):
        fork.fork().advance(model.ids[b"a"])
    assert not matcher.is_finished
    assert matcher.bitmask().tolist() == before
    beginning = start(compiler, LETTERS)
    assert model.ids[b" a"] in allowed(beginning.fork(), model)
    assert model.ids[b" a"] not in allowed(matcher.fork(), model)


def test_all_ids_of_the_same_bytes_are_allowed(compiler: GrammarCompiler, model: Model) -> None:
    same = [index for index, data in enumerate(model.table.token_bytes) if data == b"a"]
    assert len(same) == 2  # the letter, and the byte
    assert set(same) <= set(allowed(start(compiler, LETTERS), model))
    for token_id in same:
        start(compiler, LETTERS).advance(token_id)


class TestLeadingSpace:
    """A single space before an answer is not seen; everything that is seen must match."""

    def test_first_tokens_with_and_without_it(self, compiler: GrammarCompiler, model: Model) -> None:
        ids = model.ids
        assert b"the" in ids
        assert b" the" in ids
        spec = GrammarSpec("choice", '["the end"]')
        assert {ids[b"the"], ids[b" the"], ids[b" "]} <= set(allowed(start(compiler, spec), model))
        assert ids[b" end"] not in allowed(start(compiler, spec), model)
        continued = allowed(start(compiler, spec, leading_space=False), model)
        assert ids[b"the"] in continued
        assert not {ids[b" the"], ids[b" "]} & set(continued)

    def test_a_token_whose_bare_form_is_no_token(self, compiler: GrammarCompiler, model: Model) -> None:
        word = next(data for data in model.ids if data.startswith(b" ") and data.isalpha() is False and len(data) > 6
                    and data[1:].isalpha() and data[1:] not in model.ids)  # fmt: skip
        matcher = start(compiler, GrammarSpec("regex", word[1:].decode()))
        token_id = model.ids[word]
        assert token_id in allowed(matcher, model)
        matcher.advance(token_id)
        assert matcher.is_finished
        assert model.visible([token_id]) == word[1:].decode()

    def test_only_one_space_is_dropped(self, compiler: GrammarCompiler, model: Model) -> None:
        matcher = start(compiler, GrammarSpec("choice", '["a"]'))
        assert model.ids[b"  "] not in allowed(matcher, model)
        matcher.advance(model.ids[b" "])
        assert model.ids[b" a"] not in allowed(matcher, model)
        assert model.ids[b" "] not in allowed(matcher, model)
        matcher.advance(model.ids[b"a"])
        assert matcher.is_finished

    def test_a_text_that_begins_with_a_space_needs_two(self, compiler: GrammarCompiler, model: Model) -> None:
        spec = GrammarSpec("choice", '[" a"]')
        matcher = start(compiler, spec)
        assert model.ids[b" a"] not in allowed(matcher, model)  # would be seen as "a"
        assert model.ids[b"  "] in allowed(matcher, model)
        feed(matcher, [model.ids[b" "], model.ids[b" a"]])
        assert matcher.is_finished
        continued = start(compiler, spec, leading_space=False)
        continued.advance(model.ids[b" a"])
        assert continued.is_finished

    def test_the_byte_of_a_space_counts_too(self, compiler: GrammarCompiler, model: Model) -> None:
        spaces = [index for index, data in enumerate(model.table.token_bytes) if data == b" "]
        assert len(spaces) == 2
        for space in spaces:
            matcher = start(compiler, GrammarSpec("choice", '["a"]'))
            assert space in allowed(matcher, model)
            feed(matcher, [space, model.ids[b"a"]])
            assert matcher.is_finished

    @pytest.mark.parametrize("kind", ["regex", "grammar"])
    def test_what_is_seen_matches_exactly(self, compiler: GrammarCompiler, model: Model, kind: str) -> None:
        source = {"regex": " ?(a|the) ?", "grammar": 'start: " "? ("a" | "the") " "?'}[kind]
        right = {f"{before}{word}{after}" for before in ("", " ") for word in ("a", "the") for after in ("", " ")}
        chance = random.Random(0)
        for leading_space in (True, False):
            seen = set()
            for _ in range(100):
                matcher = start(compiler, GrammarSpec(kind, source), leading_space=leading_space)  # type: ignore[arg-type]
                answer = list(walk(matcher, model, chance, closing=0.0, most=20))
                assert answer[-1] in model.eos_token_ids
                seen.add(model.visible(answer) if leading_space else model.written(answer).decode())
            assert seen == right


def test_characters_may_be_split_over_tokens(compiler: GrammarCompiler, model: Model) -> None:
    matcher = start(compiler, schema_spec({"enum": ["é", "漢", "🙂🙃"]}))
    feed(matcher, model.spell('"'))
    assert {model.ids[b"\xc3"], model.ids[b"\xe6"], model.ids[b"\xf0"]} <= set(allowed(matcher, model))
    feed(matcher, model.spell(b"\xf0\x9f"))
    assert {model.table.token_bytes[token_id] for token_id in allowed(matcher, model)} == {b"\x99"}
    feed(matcher, model.spell(b"\x99"))
    assert {model.table.token_bytes[token_id] for token_id in allowed(matcher, model)} == {b"\x82"}


def test_text_is_always_whole_characters(compiler: GrammarCompiler, model: Model) -> None:
    matcher = start(compiler, GrammarSpec("regex", "(?s:.*)"))
    matcher.advance(model.ids[b"\xe2"])
    assert not set(model.eos_token_ids) & set(allowed(matcher, model))
    tokens = {model.table.token_bytes[token_id][0] for token_id in allowed(matcher, model)}
    assert tokens == set(range(0x80, 0xC0))


def test_whitespace_comes_to_an_end(compiler: GrammarCompiler, model: Model) -> None:
    ids = model.ids
    matcher = start(compiler, OBJECT)
    matcher.advance(ids[b"{"])
    one_space = matcher.fork()
    one_space.advance(ids[b" "])
    assert not {ids[b" "], ids[b"\n"], ids[b"\t"]} & set(allowed(one_space, model))
    matcher.advance(ids[b"\n"])
    for _ in range(16):
        matcher.advance(ids[b" "])
    assert not {ids[b" "], ids[b"\n"], ids[b"\t"], ids[b"  "]} & set(allowed(matcher, model))
    feed(matcher, model.spell('"a": [\n\t\t1,\n  2\n]\n}'))
    assert matcher.is_finished


def test_a_grammar_that_leads_nowhere_fails_instead_of_allowing_nothing(
    compiler: GrammarCompiler, model: Model
) -> None:
    spec = GrammarSpec("grammar", 'start: "hunter" rest\nrest: more\nmore: rest', "structured_outputs.grammar")
    matcher = start(compiler, spec)
    feed(matcher, model.spell("hunter"))
    for act in (matcher.bitmask, lambda: matcher.advance(model.ids[b"a"])):
        with pytest.raises((ClientError, ValueError)) as caught:
            act()
        assert "hunter" not in str(caught.value)
    with pytest.raises(ClientError, match="leads nowhere") as error:
        matcher.bitmask()
    assert error.value.param == "structured_outputs.grammar"


# The number of lexer states grows with every answer that differs.
STATES = GrammarSpec("regex", "[ab]*a[ab]{12}")


def test_other_answers_do_not_use_up_the_states_of_this_one(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library counts lexer states over all copies of a parser, and gives up at a limit."""
    monkeypatch.setattr(compiler_module, "LIMITS", LLParserLimits(max_lexer_states=600, verbose_errors=False))
    compiler = GrammarCompiler(model.vocabulary)
    parsed: list[LLMatcher] = []
    parse = compiler._parse
    monkeypatch.setattr(compiler, "_parse", lambda spec: parsed.append(parse(spec)) or parsed[-1])
    kept = start(compiler, STATES, leading_space=False)
    feed(kept, model.spell("abab"))
    before = kept.bitmask().tolist()
    for seed in range(12):
        chance = random.Random(seed)
        matcher = start(compiler, STATES, leading_space=False)
        for _ in range(60):
            matcher.bitmask()
            matcher.advance(model.ids[chance.choice([b"a", b"b"])])
    assert 1 < len(parsed) < 12
    assert all(parser.deep_copy() is not parser for parser in parsed)
    assert kept.bitmask().tolist() == before
    kept.advance(model.ids[b"a"])


def test_a_fork_starts_again_from_its_own_tokens(compiler: GrammarCompiler, model: Model) -> None:
    matcher = start(compiler, GrammarSpec("regex", "x[ab][cd]"))
    feed(matcher, model.spell("x"))
    fork = matcher.fork()
    feed(matcher, model.spell("a"))
    feed(fork, model.spell("bd"))
    for one in (matcher, fork):
        before = one.bitmask().tolist()
        one._start_again()
        assert one.bitmask().tolist() == before


def test_an_answer_that_is_too_much_by_itself_fails(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler_module, "LIMITS", LLParserLimits(max_lexer_states=100, verbose_errors=False))
    compiler = GrammarCompiler(model.vocabulary)
    matcher = start(compiler, STATES, leading_space=False)

    def go_on() -> None:
        chance = random.Random(0)
        for _ in range(500):
            matcher.bitmask()
            matcher.advance(model.ids[chance.choice([b"a", b"b"])])

    with pytest.raises(ClientError, match="too complex here"):
        go_on()
