from __future__ import annotations

import json
from typing import Literal

import pytest

from server.errors import ClientError
from server.grammar.compiler import GrammarCompiler
from server.grammar.sources import MAX_SOURCE_BYTES, to_library_grammar
from server.types import GrammarSpec
from tests.grammar.walks import Model, accepts, start

Kind = Literal["json_schema", "regex", "choice", "grammar"]


def takes(compiler: GrammarCompiler, model: Model, kind: Kind, source: str, text: str | bytes) -> bool:
    matcher = start(compiler, GrammarSpec(kind, source), leading_space=False)
    return accepts(matcher, model.spell(text), model)


def refusal(compiler: GrammarCompiler, kind: Kind, source: str) -> str:
    with pytest.raises(ClientError) as caught:
        start(compiler, GrammarSpec(kind, source, "the.param"))
    assert (caught.value.param, caught.value.code, caught.value.status) == ("the.param", "invalid_value", 400)
    return caught.value.message


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        ("[a-c]{2}", ["ab", "cc"], ["a", "abc", "ad"]),
        ("^abc$", ["abc"], ["^abc$", "ab"]),
        ("\\d{3}-\\d{2}", ["123-45"], ["123"]),
        ("a/b\\/c", ["a/b/c"], ["a"]),
        ('say "hi"|//', ['say "hi"', "//"], ["say"]),
        ("é+|漢字|🙂", ["éé", "漢字", "🙂"], ["漢"]),
        ("(?i)yes", ["yes", "YES"], ["no"]),
        ("a\\\\", ["a\\"], ["a"]),
        ("line\nbreak\t", ["line\nbreak\t"], ["linebreak"]),
        ("start: x", ["start: x"], ["x"]),
    ],
)
def test_a_regular_expression_matches_all_of_the_text(
    compiler: GrammarCompiler, model: Model, pattern: str, right: list[str], wrong: list[str]
) -> None:
    assert all(takes(compiler, model, "regex", pattern, text) for text in right)
    assert not any(takes(compiler, model, "regex", pattern, text) for text in wrong)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("", "is empty"),
        ("a\\", "backslash"),
        ("hunter2(", "not valid"),
        ("a(?=hunter2)", "lookaround"),
        ("a(?<!hunter2)", "lookaround"),
        ("\\bhunter2", "lookaround and anchors"),
        ("(hunter2)\\1", "backreferences"),
        ("(?-u:\\xff)hunter2", "not valid"),
        ("hunter2[^\\s\\S]", "no value satisfies it"),
        ("()", "allows no text"),
        ("\ud800", "surrogate"),
    ],
)
def test_regular_expressions_that_are_refused(compiler: GrammarCompiler, pattern: str, said: str) -> None:
    message = refusal(compiler, "regex", pattern)
    assert said in message
    assert "hunter2" not in message


CHOICES = [
    "yes",
    "no",
    "no way",
    " maybe",
    'quote " backslash \\ slash /',
    "line\nbreak",
    "é漢🙂",
    "del\x7f",
    "nul\x00",
    "#//",
]


def test_choices(compiler: GrammarCompiler, model: Model) -> None:
    source = json.dumps(CHOICES)
    assert all(takes(compiler, model, "choice", source, choice) for choice in CHOICES)
    assert not any(takes(compiler, model, "choice", source, text) for text in ["", "ye", "yesno", "maybe", "é"])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("[]", "one string or more"),
        ('"yes"', "one string or more"),
        ('["yes", 1]', "one string or more"),
        ('["yes", ""]', "empty string"),
        ('["\\ud800"]', "surrogate"),
        ("[", "not valid JSON"),
    ],
)
def test_choices_that_are_refused(compiler: GrammarCompiler, source: str, said: str) -> None:
    assert said in refusal(compiler, "choice", source)


LARK = r"""
// a comment with <image> and "quotes
start: greeting (", " name)+ "."   # another
greeting: "Hello" | /Hi<>[\/\]]?/
name: NAME
NAME: /[A-Z][a-z]+/
%ignore /[ \t]+/
"""

GBNF = r"""
# a comment
root  ::= "<" word ("," word)* ">"
word  ::= [a-z]+ | "start"
"""


def test_a_grammar_in_larks_notation(compiler: GrammarCompiler, model: Model) -> None:
    assert takes(compiler, model, "grammar", LARK, "Hello, Ada, Bob.")
    assert takes(compiler, model, "grammar", LARK, "Hi<>], Ada.")
    assert not takes(compiler, model, "grammar", LARK, "Hello.")


def test_a_grammar_in_gbnf(compiler: GrammarCompiler, model: Model) -> None:
    assert takes(compiler, model, "grammar", GBNF, "<a,bc,start>")
    assert not takes(compiler, model, "grammar", GBNF, "<a,>")


def test_lark_that_mentions_gbnfs_sign_is_lark(compiler: GrammarCompiler, model: Model) -> None:
    assert takes(compiler, model, "grammar", '?start: "a ::= " /x+/', "a ::= xx")


def test_a_schema_within_a_grammar_is_held_to_the_same_rules(compiler: GrammarCompiler, model: Model) -> None:
    grammar = (
        'start: "call " %json {"type": "array", "items": {"type": "integer"}, "x-guidance": {"lenient": true}} "!"'
    )
    assert takes(compiler, model, "grammar", grammar, "call [1, 2]!")
    assert not takes(compiler, model, "grammar", grammar, 'call ["x"]!')
    assert "keyword not" in refusal(
        compiler, "grammar", 'start: "a" %json {"not": {}, "x-guidance": {"lenient": true}}'
    )
    assert "keyword if" in refusal(compiler, "grammar", 'start: "a" %json {"items": {"if": {"const": "}"}}}')
    assert "not followed by valid JSON" in refusal(compiler, "grammar", "start: %json {")


@pytest.mark.parametrize(
    "grammar",
    [
        "start: <image>",
        'start: "a" <[32001]>',
        'start: "a" <[*]>',
        'start: "a" <[^5]>',
        'start: a\na: "\\"" <fake_token_around_image>',
        'start: a // "\na: <image>',
        'start: /a"/ <image> /"/',
        "root ::= <image>",
        'start: %lark { start: "a" <image> }',
    ],
)
def test_special_tokens_cannot_be_named(compiler: GrammarCompiler, grammar: str) -> None:
    message = refusal(compiler, "grammar", grammar)
    assert "special tokens" in message or "not valid GBNF" in message
    assert "image" not in message


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        ('%llguidance {"allow_invalid_utf8": true}\nstart: "a"', "%llguidance"),
        ('start: a "b"\na[stop="x"]: /.*/', "stop"),
        ('start: a "b"\na[capture, stop="]"]: /.*/', "stop"),
        ("start: a\na[max_tokens=3]: /.*/", "max_tokens"),
        ("start: a\na[temperature=0.5]: /.*/", "temperature"),
        ('hunter2: "a"', "cannot be compiled"),
        ("start: hunter2", "cannot be compiled"),
        ('root ::= "hunter2', "not valid GBNF"),
        ("root ::= " + "(" * 5000, "not valid GBNF"),
        ('start: ""', "allows no text"),
        ("", "cannot be compiled"),
    ],
)
def test_grammars_that_are_refused(compiler: GrammarCompiler, grammar: str, said: str) -> None:
    message = refusal(compiler, "grammar", grammar)
    assert said in message
    assert "hunter2" not in message


def test_harmless_options_and_attributes_are_kept(compiler: GrammarCompiler, model: Model) -> None:
    assert takes(compiler, model, "grammar", '%llguidance {}\nstart: a "."\na[lazy]: /[a-z]*;/', "ab;.")


@pytest.mark.parametrize("kind", ["json_schema", "regex", "choice", "grammar"])
def test_the_size_is_bounded_in_bytes(kind: Kind) -> None:
    assert len("é".encode()) == 2
    with pytest.raises(ClientError, match=f"takes {MAX_SOURCE_BYTES + 2} bytes; at most {MAX_SOURCE_BYTES}"):
        to_library_grammar(GrammarSpec(kind, "é" * (MAX_SOURCE_BYTES // 2 + 1)))


def test_the_largest_size_is_allowed(compiler: GrammarCompiler) -> None:
    choices = json.dumps(["x" * (MAX_SOURCE_BYTES - 4)])
    assert len(choices) == MAX_SOURCE_BYTES
    start(compiler, GrammarSpec("choice", choices))
