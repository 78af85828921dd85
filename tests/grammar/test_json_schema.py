from __future__ import annotations

import json
from typing import Any

import pytest

from server.errors import ClientError
from server.grammar.compiler import GrammarCompiler
from server.grammar.json_schema import FORMATS, MAX_NESTING, parse_json, prepare_schema
from tests.grammar.walks import Model, accepts, schema_spec, start

SECRET = "hunter2"


def refusal(compiler: GrammarCompiler, schema: object) -> str:
    with pytest.raises(ClientError) as caught:
        start(compiler, schema_spec(schema))
    assert caught.value.param == "response_format"
    assert caught.value.code == "invalid_value"
    return caught.value.message


def takes(compiler: GrammarCompiler, model: Model, schema: object, text: str) -> bool:
    return accepts(start(compiler, schema_spec(schema)), model.spell(text), model)


UNSUPPORTED: dict[str, Any] = {
    "not": {"type": "string"},
    "if": {"type": "string"},
    "then": True,
    "else": True,
    "contains": {"type": "string"},
    "minContains": 1,
    "maxContains": 1,
    "uniqueItems": True,
    "propertyNames": {"maxLength": 3},
    "dependencies": {"a": ["b"]},
    "dependentRequired": {"a": ["b"]},
    "dependentSchemas": {"a": {}},
    "unevaluatedItems": False,
    "unevaluatedProperties": False,
    "$dynamicRef": "#a",
    "$recursiveRef": "#",
    "disallow": "string",
    "extends": {},
    "divisibleBy": 3,
}

# Every place where a schema can stand.
PLACES = {
    "root": lambda schema: schema,
    "properties": lambda schema: {"properties": {"a": schema}},
    "patternProperties": lambda schema: {"patternProperties": {"^a": schema}},
    "additionalProperties": lambda schema: {"additionalProperties": schema},
    "items": lambda schema: {"items": schema},
    "items as a list": lambda schema: {"items": [schema]},
    "additionalItems": lambda schema: {"items": [{}], "additionalItems": schema},
    "prefixItems": lambda schema: {"prefixItems": [schema]},
    "anyOf": lambda schema: {"anyOf": [{"type": "null"}, schema]},
    "oneOf": lambda schema: {"oneOf": [{"type": "null"}, schema]},
    "allOf": lambda schema: {"allOf": [schema]},
    "$defs": lambda schema: {"$defs": {"a": schema}, "$ref": "#/$defs/a"},
    "definitions": lambda schema: {"definitions": {"a": schema}, "$ref": "#/definitions/a"},
    "elsewhere": lambda schema: {"x-parts": [{"a b": schema}], "$ref": "#/x-parts/0/a%20b"},
    "an old draft": lambda schema: {"$schema": "http://json-schema.org/draft-04/schema#", "items": schema},
    "an old draft within": lambda schema: {"items": {"$schema": "http://json-schema.org/draft-04/schema#", **schema}},
}


@pytest.mark.parametrize("keyword", UNSUPPORTED)
def test_a_keyword_that_would_be_ignored_is_refused_by_name(compiler: GrammarCompiler, keyword: str) -> None:
    for place, make in PLACES.items():
        message = refusal(compiler, make({keyword: UNSUPPORTED[keyword]}))
        assert message == f"the JSON schema is not supported: the keyword {keyword} is not supported", place


def test_a_keyword_of_a_newer_draft_is_obeyed_everywhere(compiler: GrammarCompiler, model: Model) -> None:
    for place in ("an old draft", "an old draft within"):
        schema = {**PLACES[place]({"const": 5}), "type": "array", "minItems": 1}
        assert takes(compiler, model, schema, "[5]"), place
        assert not takes(compiler, model, schema, "[6]"), place


@pytest.mark.parametrize("name", ["not", "if", "$ref", "uniqueItems", "format", "const"])
def test_names_of_properties_are_not_keywords(compiler: GrammarCompiler, model: Model, name: str) -> None:
    schema = {"type": "object", "properties": {name: {"type": "null"}}, "required": [name]}
    assert takes(compiler, model, schema, json.dumps({name: None}))


def test_values_are_not_schemas(compiler: GrammarCompiler, model: Model) -> None:
    assert takes(compiler, model, {"const": {"not": {}}}, '{"not":{}}')
    assert takes(compiler, model, {"enum": [{"if": 1, "$ref": "x"}]}, '{"if":1,"$ref":"x"}')


def test_what_says_nothing_is_dropped(compiler: GrammarCompiler, model: Model) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": False, "x-mine": {"not": 1}, "title": "t"}
    assert takes(compiler, model, schema, "[1,1]")


@pytest.mark.parametrize("type_", ["string", ["null", "string"], None])
def test_an_unknown_format_of_strings_is_refused(compiler: GrammarCompiler, type_: object) -> None:
    schema = {"format": SECRET} if type_ is None else {"type": type_, "format": SECRET}
    message = refusal(compiler, schema)
    assert all(name in message for name in FORMATS)
    assert SECRET not in message


def test_a_format_of_numbers_is_a_note(compiler: GrammarCompiler, model: Model) -> None:
    assert takes(compiler, model, {"type": "integer", "format": "int32"}, "7")
    assert takes(compiler, model, {"type": ["integer", "null"], "format": "int32"}, "7")


@pytest.mark.parametrize("name", FORMATS)
def test_known_formats_are_kept(compiler: GrammarCompiler, model: Model, name: str) -> None:
    examples = {
        "date": "2024-02-29",
        "date-time": "2024-02-29T12:00:00Z",
        "duration": "P1D",
        "email": "a@b.example",
        "hostname": "a.example",
        "ipv4": "127.0.0.1",
        "ipv6": "::1",
        "time": "12:00:00Z",
        "uri": "https://a.example/b?c",
        "uuid": "123e4567-e89b-12d3-a456-426614174000",
    }
    schema = {"type": "string", "format": name}
    assert takes(compiler, model, schema, json.dumps(examples[name]))
    assert not takes(compiler, model, schema, '"!"')


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("https://a.example/schema", "only point into the schema"),
        ("other.json", "only point into the schema"),
        ("#name", "only point into the schema"),
        ("#/$defs/nothing", "points to nothing"),
        ("#/$defs/list/2", "points to nothing"),
        ("#/$defs/list/-1", "points to nothing"),
        (5, "only point into the schema"),
    ],
)
def test_references_stay_within(compiler: GrammarCompiler, reference: object, said: str) -> None:
    schema = {"$defs": {"list": [True, True]}, "items": {"$ref": reference}}
    assert said in refusal(compiler, schema)


@pytest.mark.parametrize(
    ("name", "reference"),
    [("a", "a"), ("a/b", "a~1b"), ("a~b", "a~0b"), ("a b", "a b"), ("a b", "a%20b"), ("é", "é"), ("é", "%C3%A9")],
)
def test_references_are_followed(compiler: GrammarCompiler, model: Model, name: str, reference: str) -> None:
    schema = {"$defs": {name: {"const": "x"}}, "$ref": f"#/$defs/{reference}"}
    assert takes(compiler, model, schema, '"x"')
    assert not takes(compiler, model, schema, '"y"')


def test_a_base_within_the_schema_would_change_references(compiler: GrammarCompiler, model: Model) -> None:
    inner = {"$id": "https://a.example/b", "$ref": "#/$defs/a"}
    assert "$id" in refusal(compiler, {"$defs": {"a": {"type": "null"}}, "items": inner})
    outer = {"$id": "https://a.example/b", "$defs": {"a": {"type": "null"}}, "$ref": "#/$defs/a"}
    assert takes(compiler, model, outer, "null")
    assert takes(compiler, model, {"properties": {"a": {"$id": "#/properties/a", "type": "null"}}}, '{"a":null}')


def test_a_key_is_written_in_one_way(compiler: GrammarCompiler, model: Model) -> None:
    """Else `a` could come again as an additional property, and the later one counts."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert takes(compiler, model, schema, '{"a":1,"b":"x"}')
    assert not takes(compiler, model, schema, '{"a":1,"a":"x"}')
    assert not takes(compiler, model, schema, '{"a":1,"\\u0061":"x"}')
    assert not takes(compiler, model, schema, '{"\\u0061":"x"}')


@pytest.mark.parametrize("text", ["a\u0001", "\u007f", "\u001f", {"k": ["\u0000"]}])
def test_constants_that_cannot_be_written_are_refused(compiler: GrammarCompiler, text: object) -> None:
    assert "control character" in refusal(compiler, {"const": text})
    assert "control character" in refusal(compiler, {"enum": ["fine", text]})


def test_constants_with_short_escapes_are_written(compiler: GrammarCompiler, model: Model) -> None:
    text = 'tab\t line\n return\r back\b feed\f quote" backslash\\ é 漢 🙂'
    assert takes(compiler, model, {"const": text}, json.dumps(text, ensure_ascii=False))


@pytest.mark.parametrize(
    "pattern",
    ["^a\u0001$", "^\\x01$", "^\\x{1}$", "^\\u0001$", "^\\x7f$", "^[\\x01-\\x03]$", "^\\v$", "^\\0$", "^\\cA$"],
)
def test_patterns_of_characters_that_cannot_be_written_are_refused(compiler: GrammarCompiler, pattern: str) -> None:
    assert "control character" in refusal(compiler, {"type": "string", "pattern": pattern})
    assert "control character" in refusal(compiler, {"patternProperties": {pattern: {}}})


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("^[^\\x00-\\x1f]+$", "a"),
        ("^\\x41$", "A"),
        ("^\\u0041$", "A"),
        ("^\\\\x01$", "\\x01"),
        ("^\\d\\w\\s$", "1a\t"),
        ("^é漢$", "é漢"),
        ("b", "abc"),
    ],
)
def test_other_patterns_are_kept(compiler: GrammarCompiler, model: Model, pattern: str, text: str) -> None:
    schema = {"type": "string", "pattern": pattern}
    assert takes(compiler, model, schema, json.dumps(text, ensure_ascii=False))
    assert not takes(compiler, model, schema, '"☃"') or pattern.startswith("^[^")


def test_a_pattern_may_not_end_in_half_an_escape(compiler: GrammarCompiler) -> None:
    assert "backslash" in refusal(compiler, {"type": "string", "pattern": "a\\"})


@pytest.mark.parametrize(("least", "required", "fine"), [(1, 0, True), (2, 1, True), (2, 0, False), (3, 1, False)])
def test_keys_that_may_come_twice_do_not_count_twice(
    compiler: GrammarCompiler, least: int, required: int, fine: bool
) -> None:
    names = [f"n{index}" for index in range(required)]
    schema = {
        "type": "object",
        "minProperties": least,
        "required": names,
        "properties": {name: {} for name in names},
        "additionalProperties": {"type": "null"},
    }
    if fine:
        start(compiler, schema_spec(schema))
    else:
        assert "minProperties" in refusal(compiler, schema)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "string", "minLength": 3, "maxLength": 2}, "no value satisfies it"),
        (False, "is an object"),
        ([], "is an object"),
        ("x", "is an object"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "exclude each other"),
        ({"type": "string", "pattern": "a(?=b)"}, "lookaround"),
        ({"type": "string", "pattern": "(a)\\1"}, "backreferences"),
        ({"type": "string", "pattern": f"{SECRET}("}, "regular expression"),
        ({"type": SECRET}, "cannot be compiled"),
        ({"properties": {"a": {}}, "maxProperties": 1}, "minProperties and maxProperties"),
        ({"patternProperties": {f"^{SECRET}": {}, "2$": {}}}, "patterns exclude each other"),
        ({"$ref": "#", "type": "object"}, "form a circle"),
        ({"type": "array", "items": [{"$ref": f"#/{SECRET}"}]}, "points to nothing"),
    ],
)
def test_messages_say_why_in_our_own_words(compiler: GrammarCompiler, schema: object, said: str) -> None:
    message = refusal(compiler, schema)
    assert said in message
    assert SECRET not in message


def test_true_is_any_value(compiler: GrammarCompiler, model: Model) -> None:
    assert takes(compiler, model, True, '[{"a":null},"b",-1.5e3]')


def test_options_of_the_library_are_not_the_clients(compiler: GrammarCompiler, model: Model) -> None:
    schema = {"x-guidance": {"lenient": True, "whitespace_flexible": False, "item_separator": "x"}, "not": {}}
    assert "not" in refusal(compiler, schema)
    schema = {"x-guidance": {"item_separator": "x", "key_separator": "y"}, "type": "array"}
    assert takes(compiler, model, schema, "[1,2]")
    assert not takes(compiler, model, schema, "[1x2]")


@pytest.mark.parametrize("text", ["", "{", "nope", '{"a":NaN}', "[Infinity]", "[" * 100_000, "1" * 5000, '{"a":1}x'])
def test_text_that_is_no_json(text: str) -> None:
    with pytest.raises(ClientError, match=r"^it is not valid JSON$"):
        parse_json(text, what="it", param="p")


def test_nesting_is_bounded() -> None:
    assert parse_json("[" * MAX_NESTING + "]" * MAX_NESTING, what="it", param="p")
    with pytest.raises(ClientError, match=f"nested {MAX_NESTING + 1} levels deep; at most {MAX_NESTING}"):
        parse_json("[" * (MAX_NESTING + 1) + "]" * (MAX_NESTING + 1), what="it", param="p")


def test_a_prepared_schema_keeps_the_order_of_its_keys() -> None:
    prepared = prepare_schema({"properties": {"b": {}, "a": {}}, "type": "object"}, param="p")
    assert list(prepared["properties"]) == ["b", "a"]
