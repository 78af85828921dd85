"""Random answers through many schemas: each is valid, each ends, and the masks tell the truth on the way."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest

from server.grammar.compiler import GrammarCompiler
from server.grammar.matcher import Matcher
from server.grammar.vocabulary import expand_bitmask
from tests.grammar.schemas import generate_schemas
from tests.grammar.walks import Model, schema_spec, start, walk

FORMATS = ("email", "ipv4", "ipv6", "uuid")
CHECKED_FORMATS = jsonschema.FormatChecker(FORMATS)

# One of every keyword that is supported, and what they do together.
NULL = {"type": "null"}
INTEGER = {"type": "integer"}
KEYWORDS: dict[str, Any] = {
    "any": {"type": ["object", "array", "null"]},
    "types": {"type": ["integer", "null", "boolean", "string"], "maxLength": 5},
    "const": {"const": {"a": [1, "é", None, -2.5, {"b": "quote\" \\ \n"}]}},
    "enum": {"enum": ["one", "two words", 3, -4.25, None, True, [], {"k": "v"}]},
    "properties": {"properties": {"a": INTEGER, "b": NULL}, "required": ["b"], "type": "object"},
    "closed": {"properties": {"a": NULL}, "additionalProperties": False, "type": "object"},
    "additional": {"type": "object", "properties": {"a": NULL}, "additionalProperties": INTEGER},
    "pattern properties": {
        "type": "object",
        "properties": {"n1": {"type": "integer", "minimum": 5}},
        "patternProperties": {"^n\\d$": {"type": "integer", "maximum": 50}, "^s": {"type": "string", "maxLength": 3}},
        "additionalProperties": False,
    },
    "one property at least": {
        "type": "object",
        "properties": {"a": NULL, "b": NULL},
        "minProperties": 1,
        "additionalProperties": False,
    },
    "counted properties": {
        "type": "object",
        "required": ["a"],
        "properties": {"a": NULL},
        "additionalProperties": {"type": "boolean"},
        "minProperties": 2,
        "maxProperties": 4,
    },
    "items": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [NULL, {"const": 1}], "items": False, "minItems": 1},
    "tuple and rest": {"type": "array", "prefixItems": [{"const": "x"}], "items": INTEGER, "minItems": 2},
    "lengths": {"type": "string", "minLength": 3, "maxLength": 6},
    "pattern": {"type": "string", "pattern": "^[A-ZÄÖ]{2,3}-\\d+$"},
    "pattern within": {"type": "string", "pattern": "x.z", "maxLength": 10},
    "pattern and length": {"type": "string", "pattern": "^(ab)+$", "minLength": 5, "maxLength": 9},
    "range": {"type": "integer", "minimum": -17, "maximum": 1234},
    "open range": {"type": "integer", "exclusiveMinimum": 99},
    "real range": {"type": "number", "minimum": -0.5, "exclusiveMaximum": 2.75},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": -100, "maximum": 100},
    "anyOf": {"anyOf": [{"type": "string", "maxLength": 2}, NULL, {"type": "array", "items": {"const": 0}}]},
    "oneOf": {"oneOf": [INTEGER, {"type": "string", "maxLength": 2}, {"type": "array", "maxItems": 0}]},
    "oneOf by constant": {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": kind}, kind: INTEGER}, "required": ["k", kind]}
            for kind in ("a", "b")
        ]
    },
    "allOf": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]},
            {"type": "object", "properties": {"a": {"maximum": 9}, "b": NULL}, "required": ["b"]},
        ]
    },
    "references": {
        "$defs": {
            "name": {"type": "string", "maxLength": 4},
            "pair": {"type": "array", "items": {"$ref": "#/$defs/name"}},
        },
        "type": "object",
        "properties": {"p": {"$ref": "#/$defs/pair", "maxItems": 2}},
        "required": ["p"],
        "additionalProperties": False,
    },
    "recursion": {
        "type": "object",
        "properties": {"v": INTEGER, "left": {"$ref": "#"}, "right": {"anyOf": [{"$ref": "#"}, NULL]}},
        "required": ["v"],
        "additionalProperties": False,
    },
    "unicode": {
        "type": "object",
        "properties": {"naïveté": {"enum": ["ß", "漢字", "🙂"]}, "キー": {"type": "string", "pattern": "^[а-я]{1,3}$"}},
        "required": ["naïveté", "キー"],
        "additionalProperties": False,
    },
    "older drafts": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "definitions": {"n": {"type": "integer", "minimum": 0}},
        "type": "array",
        "items": [{"$ref": "#/definitions/n"}, {"type": "boolean"}],
        "additionalItems": False,
        "minItems": 2,
    },
    **{f"format {name}": {"type": "string", "format": name, "maxLength": 40} for name in FORMATS},
}  # fmt: skip


def validate(text: str, schema: Any) -> None:
    jsonschema.validate(json.loads(text), schema, format_checker=CHECKED_FORMATS)


@pytest.mark.parametrize("name", KEYWORDS)
def test_answers_are_valid(compiler: GrammarCompiler, model: Model, name: str) -> None:
    chance = random.Random(name)
    prototype = start(compiler, schema_spec(KEYWORDS[name]))
    for closing in (0.1, 0.4, 0.7, 0.9):
        matcher = prototype.fork()
        answer = list(walk(matcher, model, chance, closing=closing, most=1500))
        if closing > 0.3:
            assert answer[-1] in model.eos_token_ids
        if answer[-1] in model.eos_token_ids:
            assert matcher.is_finished
            validate(model.visible(answer), KEYWORDS[name])


def test_answers_to_realistic_schemas_are_valid(compiler: GrammarCompiler, model: Model) -> None:
    lengths = []
    for index, schema in enumerate(generate_schemas(100, seed=1)):
        chance = random.Random(index)
        answer = list(walk(start(compiler, schema_spec(schema)), model, chance, closing=0.5, most=2000))
        assert answer[-1] in model.eos_token_ids, schema
        validate(model.visible(answer), schema)
        lengths.append(len(answer))
    assert np.quantile(lengths, 0.95) < 300


def test_masks_tell_what_may_come(compiler: GrammarCompiler, model: Model) -> None:
    """At points of random answers: what is allowed can come, what is not cannot, and the end is where a value ends."""
    chance = random.Random(2)
    for name, schema in KEYWORDS.items():
        matcher = start(compiler, schema_spec(schema))
        answer: list[int] = []
        for token_id in walk(matcher.fork(), model, chance, closing=0.3, most=12):
            mask = expand_bitmask(matcher.bitmask(), model.vocab_size)
            _check_mask(matcher, mask, model, chance)
            may_end = bool(mask[list(model.eos_token_ids)].any())
            assert may_end == _is_value(model.visible(answer), schema), (name, model.visible(answer))
            if token_id in model.eos_token_ids:
                break
            matcher.advance(token_id)
            answer.append(token_id)


def _check_mask(matcher: Matcher, mask: np.ndarray, model: Model, chance: random.Random) -> None:
    assert mask.any()
    ends = mask[list(model.eos_token_ids)]
    assert ends.all() or not ends.any()
    special = [token_id for token_id in model.table.special_ids if token_id not in model.eos_token_ids]
    assert not mask[special].any()
    assert not mask[len(model.table.token_bytes) :].any()
    for token_id in chance.choices(np.flatnonzero(mask), k=4):
        matcher.fork().advance(int(token_id))
    for token_id in chance.choices(np.flatnonzero(~mask), k=4):
        with pytest.raises(ValueError, match="token"):
            matcher.fork().advance(int(token_id))


def _is_value(text: str, schema: Any) -> bool:
    try:
        validate(text, schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def test_generated_schemas_are_many_and_follow_from_the_seed() -> None:
    schemas = generate_schemas(600, seed=0)
    assert len({json.dumps(schema) for schema in schemas}) == 600
    assert schemas == generate_schemas(600, seed=0)
    assert schemas[:600] != generate_schemas(600, seed=1)
    text = json.dumps(schemas)
    keywords = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const", "pattern", "format", "prefixItems", "minItems",
                "patternProperties", "additionalProperties", "minLength", "multipleOf", "exclusiveMinimum")  # fmt: skip
    assert all(f'"{keyword}"' in text for keyword in keywords)


def test_generated_schemas_are_all_supported(compiler: GrammarCompiler) -> None:
    for schema in generate_schemas(600, seed=0):
        start(compiler, schema_spec(schema))
