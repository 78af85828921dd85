"""Every way to say what an answer must match, and what two of them at once come to."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from server.api.protocol import validate
from server.api.sampling import SamplingRequest, to_sampling_params
from server.api.structured import MAX_SOURCE_BYTES, find_grammar, schema_source
from server.errors import ClientError
from server.types import GrammarSpec

SCHEMA = {"type": "object", "properties": {"z": {"const": None}, "a": {"type": "string", "pattern": "é"}}}
SOURCE = '{"type":"object","properties":{"z":{"const":null},"a":{"type":"string","pattern":"é"}}}'
ANY_OBJECT = '{"type":"object"}'
TYPE, VALUE, MISSING = "invalid_type", "invalid_value", "missing_required_parameter"


def parse(**fields: Any) -> GrammarSpec | None:
    request = SamplingRequest.model_validate(fields)
    grammar = to_sampling_params(request, max_tokens=None, vocab_size=10).grammar
    assert grammar == find_grammar(request)
    return grammar


def refused(**fields: Any) -> ClientError:
    with pytest.raises(ClientError) as caught:
        to_sampling_params(validate(SamplingRequest, fields), max_tokens=None, vocab_size=10)
    assert caught.value.status == 400
    return caught.value


def wrapped(schema: Any = SCHEMA, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}


@pytest.mark.parametrize(
    ("fields", "kind", "source", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", ANY_OBJECT, "response_format"),
        ({"response_format": wrapped()}, "json_schema", SOURCE, "response_format"),
        ({"response_format": wrapped(strict=True, description="d")}, "json_schema", SOURCE, "response_format"),
        ({"response_format": wrapped(strict=False)}, "json_schema", SOURCE, "response_format"),
        ({"response_format": wrapped(None)}, "json_schema", ANY_OBJECT, "response_format"),
        ({"response_format": wrapped(True)}, "json_schema", "true", "response_format"),
        ({"response_format": wrapped({})}, "json_schema", "{}", "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "json_schema", ANY_OBJECT, "response_format"),
        # What others than OpenAI take.
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "json_schema", SOURCE, "response_format"),
        ({"response_format": {"type": "json_object", "value": SCHEMA}}, "json_schema", SOURCE, "response_format"),
        ({"response_format": {"type": "json", "value": SCHEMA}}, "json_schema", SOURCE, "response_format"),
        ({"response_format": {"type": "json", "value": SOURCE}}, "json_schema", SOURCE, "response_format"),
        ({"response_format": {"type": "regex", "value": "a+"}}, "regex", "a+", "response_format"),
        (
            {"response_format": {"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}},
            *("json_schema", SOURCE, "response_format"),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, "json_schema", SOURCE, "structured_outputs.json"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json_schema", SOURCE, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a|b"}}, "regex", "a|b", "structured_outputs.regex"),
        ({"structured_outputs": {"choice": ["é", '"']}}, "choice", '["é","\\""]', "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "start: X"}}, "grammar", "start: X", "structured_outputs.grammar"),
        ({"structured_outputs": {"json_object": True}}, "json_schema", ANY_OBJECT, "structured_outputs.json_object"),
        (
            {
                "structured_outputs": {
                    "regex": "a",
                    "json": None,
                    "json_object": False,
                    "disable_any_whitespace": True,
                    "whitespace_pattern": " ",
                    "_backend": "x",
                }
            },
            *("regex", "a", "structured_outputs.regex"),
        ),
        ({"guided_json": SCHEMA}, "json_schema", SOURCE, "guided_json"),
        ({"guided_json": f" {SOURCE}\n"}, "json_schema", SOURCE, "guided_json"),
        (
            {"guided_regex": "a", "guided_decoding_backend": "x", "guided_whitespace_pattern": " "},
            *("regex", "a", "guided_regex"),
        ),
        ({"guided_choice": ["a", "b"]}, "choice", '["a","b"]', "guided_choice"),
        ({"guided_grammar": "start: X"}, "grammar", "start: X", "guided_grammar"),
        ({"regex": "[0-9]"}, "regex", "[0-9]", "regex"),
        ({"grammar": {"type": "json", "value": SCHEMA}}, "json_schema", SOURCE, "grammar"),
        ({"grammar": {"type": "json_object", "value": SOURCE}}, "json_schema", SOURCE, "grammar"),
        ({"grammar": {"type": "json_schema", "value": {"schema": SCHEMA}}}, "json_schema", SOURCE, "grammar"),
        ({"grammar": {"type": "json_schema", "value": SCHEMA}}, "json_schema", SOURCE, "grammar"),
        ({"grammar": {"type": "regex", "value": "a"}}, "regex", "a", "grammar"),
    ],
)
def test_what_is_asked_for(fields: dict[str, Any], kind: str, source: str, param: str) -> None:
    assert parse(**fields) == GrammarSpec(kind, source, param)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [{}, {"response_format": {"type": "text"}}, {"response_format": None}, {"guided_choice": None, "grammar": None}],
)
def test_nothing_is_asked_for(fields: dict[str, Any]) -> None:
    assert parse(**fields) is None


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", VALUE),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "unsupported_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", MISSING),
        ({"response_format": {"type": "json_schema", "json_schema": "x"}}, "response_format.json_schema", TYPE),
        ({"response_format": wrapped([])}, "response_format", TYPE),
        ({"response_format": wrapped("no JSON")}, "response_format", VALUE),
        ({"response_format": wrapped('"x"')}, "response_format", TYPE),
        ({"response_format": wrapped(name="a b")}, "response_format.json_schema.name", VALUE),
        ({"response_format": wrapped(name="x" * 65)}, "response_format.json_schema.name", VALUE),
        ({"response_format": wrapped(strict="yes")}, "response_format.json_schema.strict", TYPE),
        ({"response_format": wrapped({"const": math.inf})}, "response_format", VALUE),
        ({"response_format": {"type": "json"}}, "response_format.value", MISSING),
        ({"response_format": {"type": "regex"}}, "response_format.value", MISSING),
        ({"response_format": {"type": "regex", "value": {}}}, "response_format.value", TYPE),
        ({"structured_outputs": {}}, "structured_outputs", VALUE),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", VALUE),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs", VALUE),
        ({"structured_outputs": {"choice": ["a"], "json_object": True}}, "structured_outputs", VALUE),
        ({"structured_outputs": {"structural_tag": {}}}, "structured_outputs.structural_tag", "unsupported_value"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "empty_array"),
        ({"structured_outputs": {"choice": ["a", 5]}}, "structured_outputs.choice[1]", TYPE),
        ({"structured_outputs": {"choice": "a"}}, "structured_outputs.choice", TYPE),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs.regex", TYPE),
        ({"structured_outputs": "json"}, "structured_outputs", TYPE),
        ({"guided_json": 5}, "guided_json", TYPE),
        ({"guided_json": "{"}, "guided_json", VALUE),
        ({"guided_regex": ["a"]}, "guided_regex", TYPE),
        ({"guided_choice": []}, "guided_choice", "empty_array"),
        ({"guided_choice": ["x"] * 4097}, "guided_choice", "array_above_max_length"),
        ({"guided_grammar": {}}, "guided_grammar", TYPE),
        ({"regex": 5}, "regex", TYPE),
        ({"grammar": "start: X"}, "grammar", TYPE),
        ({"grammar": {"type": "json"}}, "grammar.value", MISSING),
        ({"grammar": {"type": "lark", "value": "x"}}, "grammar.type", VALUE),
        ({"grammar": {"type": "regex", "value": 5}}, "grammar.value", TYPE),
        ({"grammar": {"type": "json", "value": 5}}, "grammar", TYPE),
    ],
)
def test_refused(fields: dict[str, Any], param: str, code: str) -> None:
    error = refused(**fields)
    assert (error.param, error.code) == (param, code)
    assert f"'{param}" in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format"),
        ({"guided_json": SCHEMA, "guided_choice": ["a"]}, "guided_choice"),
        ({"structured_outputs": {"regex": "a"}, "regex": "b"}, "regex"),
        ({"structured_outputs": {"regex": "a"}, "guided_grammar": "a"}, "guided_grammar"),
        ({"grammar": {"type": "regex", "value": "a"}, "response_format": wrapped()}, "response_format"),
    ],
)
def test_two_that_differ(fields: dict[str, Any], param: str) -> None:
    error = refused(**fields)
    assert (error.param, error.code) == (param, VALUE)
    assert error.message.count("'") == 4  # it names both


def test_two_that_say_the_same_are_one() -> None:
    assert parse(guided_json=SCHEMA, response_format=wrapped()) == GrammarSpec("json_schema", SOURCE, "guided_json")
    assert parse(response_format={"type": "text"}, regex="a") == GrammarSpec("regex", "a", "regex")


def test_a_constraint_of_the_endpoint() -> None:
    own = GrammarSpec("regex", "a", "tools")
    request = SamplingRequest.model_validate({"guided_regex": "a"})
    assert find_grammar(SamplingRequest(), own) == find_grammar(request, own) == own
    with pytest.raises(ClientError) as caught:
        find_grammar(SamplingRequest.model_validate({"guided_regex": "b"}), own)
    assert caught.value.param == "guided_regex"


def filled(num_bytes: int, *, wide: bool = False) -> str:
    return ("é" * (num_bytes // 2)) if wide else "a" * num_bytes


@pytest.mark.parametrize(
    ("fields", "overhead", "param"),
    [
        (lambda text: {"guided_regex": text}, 0, "guided_regex"),
        (lambda text: {"structured_outputs": {"grammar": text}}, 0, "structured_outputs.grammar"),
        (lambda text: {"guided_choice": [text]}, 4, "guided_choice"),
        (lambda text: {"response_format": wrapped({"const": text})}, 12, "response_format"),
        (lambda text: {"guided_json": f'{{"const":"{text}"}}'}, 12, "guided_json"),
    ],
)
@pytest.mark.parametrize("wide", [False, True])
def test_size(fields: Any, overhead: int, param: str, *, wide: bool) -> None:
    """In bytes of UTF-8."""
    largest = MAX_SOURCE_BYTES - overhead
    spec = parse(**fields(filled(largest, wide=wide)))
    assert spec is not None
    assert len(spec.source.encode()) == MAX_SOURCE_BYTES
    error = refused(**fields(filled(largest, wide=wide) + "a"))
    assert (error.param, error.code) == (param, VALUE)
    assert error.message.endswith(f"must have at most 65536 bytes, but has {MAX_SOURCE_BYTES + 1}")


def test_a_schema_keeps_its_order_and_its_nulls() -> None:
    assert (
        schema_source({"b": [1.5, None, True], "a": {"$ref": "#/x"}}, "p") == '{"b":[1.5,null,true],"a":{"$ref":"#/x"}}'
    )


def test_what_a_client_wrote_is_not_repeated() -> None:
    for fields in (
        {"guided_json": "sEcReT"},
        {"guided_choice": ["sEcReT", 5]},
        {"response_format": {"type": "sEcReT"}},
    ):
        assert "sEcReT" not in refused(**fields).message
