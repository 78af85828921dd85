"""Conformance cases 41 to 46: answers that must match something, and tools.

The weights are random, so a bias towards what closes strings, lists and objects keeps answers short; everything else
an answer must be follows from its grammar alone.
"""

from __future__ import annotations

import json
import re
import time
from typing import Any

import jsonschema
import openai
import pytest

from tests.conformance.talk import Answer, Api, Json, Stream, force, user

CLOSING = ('"', '"}', '"]', "}", "}}", "]", '",')


@pytest.fixture(scope="module")
def closing(vocabulary: dict[str, int]) -> Json:
    """Fields that make a model come to an end wherever a grammar lets it."""
    bias = {str(vocabulary[piece]): 50 for piece in CLOSING if piece in vocabulary}
    assert len(bias) >= 4
    return {"logit_bias": bias, "max_tokens": 400}


SCHEMAS: dict[str, Json] = {
    "references": {
        "$defs": {"point": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}},
        "type": "object",
        "properties": {"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}},
        "required": ["from", "to"],
        "additionalProperties": False,
    },
    "recursion": {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
                },
                "required": ["name", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    },
    "unions": {
        "type": "object",
        "properties": {
            "a": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "b": {"enum": ["red", "green", 3, None]},
            "c": {"const": "always"},
            "d": {"type": ["boolean", "null"]},
        },
        "required": ["a", "b", "c", "d"],
        "additionalProperties": False,
    },
    "as pydantic writes it": {
        "$defs": {
            "Line": {
                "properties": {
                    "what": {"title": "What", "type": "string", "maxLength": 20},
                    "count": {"title": "Count", "type": "integer", "minimum": 1, "maximum": 99},
                },
                "required": ["what", "count"],
                "title": "Line",
                "type": "object",
                "additionalProperties": False,
            }
        },
        "properties": {
            "lines": {
                "items": {"$ref": "#/$defs/Line"},
                "minItems": 1,
                "maxItems": 3,
                "title": "Lines",
                "type": "array",
            },
            "note": {"anyOf": [{"type": "string", "maxLength": 20}, {"type": "null"}], "title": "Note"},
        },
        "required": ["lines", "note"],
        "title": "Receipt",
        "type": "object",
        "additionalProperties": False,
    },
    "a list": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
}


def wanted(schema: Any, **more: Any) -> Json:
    return {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "strict": True, "schema": schema, **more},
        }
    }


def check(content: str, schema: Any) -> Any:
    value = json.loads(content)
    jsonschema.Draft202012Validator(schema).validate(value)
    return value


def test_case_41_any_json_object(api: Api, closing: Json) -> None:
    for fields in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        for sampled in ({}, {"temperature": 1, "seed": 4}):
            answer = api.chat("Give me JSON", **fields, **closing, **sampled)
            assert answer.reason == "stop"
            assert isinstance(json.loads(answer.text), dict)
    without_schema = {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}
    assert isinstance(json.loads(api.chat("Give me JSON", **without_schema, **closing).text), dict)
    cut = api.chat("Give me JSON", response_format={"type": "json_object"}, max_tokens=2)
    assert (cut.reason, cut.completion_tokens) == ("length", 2)
    assert cut.text.lstrip().startswith("{")


@pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)
@pytest.mark.parametrize("temperature", [0, 1])
def test_case_41_answers_match_their_schema(api: Api, closing: Json, schema: Json, temperature: float) -> None:
    answer = api.chat("Fill it in", **wanted(schema), **closing, temperature=temperature, seed=8)
    assert answer.reason == "stop"
    check(answer.text, schema)
    unstrict = api.chat("Fill it in", **wanted(schema, strict=False), **closing, temperature=temperature, seed=8)
    assert unstrict.text == answer.text


def test_case_41_every_choice_of_an_enum_can_come(api: Api) -> None:
    texts = {
        api.chat("Which?", structured_outputs={"choice": ["red", "green", "blue"]}, temperature=2, seed=seed).text
        for seed in range(30)
    }
    assert texts == {"red", "green", "blue"}
    answer = api.chat("When?", structured_outputs={"regex": r"[0-9]{4}-[01][0-9]"}, max_tokens=20)
    assert re.fullmatch(r"[0-9]{4}-[01][0-9]", answer.text)
    assert answer.reason == "stop"
    counted = api.chat("Count", structured_outputs={"grammar": 'start: "one" (" two" | " three")'}, max_tokens=20)
    assert counted.text in ("one two", "one three")


def nested(depth: int) -> Json:
    schema: Json = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


BAD_SCHEMAS = {
    "remote": {"$ref": "https://example.com/schema.json"},
    "a file": {"$ref": "file:///etc/passwd"},
    "nowhere": {"$ref": "#/$defs/missing"},
    "150 deep": nested(50),
    "1 MB": {"enum": ["x" * 1000 + str(index) for index in range(1000)]},
    "no type": {"type": "strin"},
    "a bad pattern": {"type": "string", "pattern": "("},
    "nothing fits": {"type": "object", "properties": {"a": False}, "required": ["a"]},
    "false": False,
}


@pytest.mark.parametrize("schema", [schema for name, schema in BAD_SCHEMAS.items() if name != "150 deep"])
def test_case_42_schemas_that_are_refused(api: Api, schema: Any) -> None:
    started = time.monotonic()
    error = api.refuses_chat("Hi", **wanted(schema), code="invalid_value", param="response_format")
    assert time.monotonic() - started < 5
    assert "example.com" not in error["message"]
    assert "passwd" not in error["message"]


def test_case_42_schemas_nested_deep(api: Api) -> None:
    """No parser of ours goes that deep into what a stranger sends."""
    body = json.dumps({"messages": [user("Hi")], **wanted("here")})
    deep = '{"items":' * 10_000 + "{}" + "}" * 10_000
    started = time.monotonic()
    api.refuses(body.replace('"here"', deep).encode(), code="invalid_json", param=None)
    as_text = {"structured_outputs": {"json": deep}}
    api.refuses_chat("Hi", **as_text, code="invalid_value", param="structured_outputs.json")
    assert time.monotonic() - started < 5
    api.chat("Hi", **wanted(nested(20)), max_tokens=20)


@pytest.mark.parametrize("expression", ["(", "[z-a]", "a{9,1}", "(?P<x>a)(?P=x)", r"(a)\1", "(?<=a)b"])
def test_case_42_expressions_that_are_refused(api: Api, expression: str) -> None:
    started = time.monotonic()
    error = api.refuses_chat(
        "Hi", structured_outputs={"regex": expression}, code="invalid_value", param="structured_outputs.regex"
    )
    assert expression not in error["message"]
    api.refuses_chat("Hi", guided_regex=expression, code="invalid_value", param="guided_regex")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "expression", ["(a+)+", "(a|aa)+", "(a*)*b", "(.*.*.*)*x", "(a?){30}a{30}", "((a{1000}){1000}){1000}"]
)
def test_case_42_expressions_that_explode_elsewhere(api: Api, vocabulary: dict[str, int], expression: str) -> None:
    """Nothing here backtracks: what brings other engines to a halt is an ordinary expression."""
    started = time.monotonic()
    likes_a = {"logit_bias": {str(vocabulary["a"]): 20, str(vocabulary["aa"]): 20}}
    answer = api.chat("Hi", structured_outputs={"regex": expression}, max_tokens=30, **likes_a)
    assert time.monotonic() - started < 5
    if answer.reason == "stop":
        assert re.fullmatch(expression.replace("(a+)+", "a+").replace("(.*.*.*)*x", ".*x"), answer.text)


def test_case_42_a_schema_that_is_refused_disturbs_nobody(api: Api) -> None:
    alone = api.chat("Steady", max_tokens=60, ignore_eos=True).text
    requests: list[tuple[str, Json]] = [("Steady", {"max_tokens": 60, "ignore_eos": True})] * 3
    body = {"messages": [user("Hi")], **wanted(BAD_SCHEMAS["remote"])}
    answers = api.all_at_once(requests)
    for _ in range(20):
        assert api.post(body).status_code == 400
    assert [answer.text for answer in answers] == [alone] * 3


def test_case_43_a_schema_and_a_stop(api: Api) -> None:
    whole = api.chat("Hi", **force('{"a": 1, "b": [2, 3]}'), max_tokens=60)
    assert whole.text == '{"a": 1, "b": [2, 3]}'
    stopped = api.chat("Hi", **force('{"a": 1, "b": [2, 3]}'), max_tokens=60, stop='"b"')
    assert (stopped.text, stopped.reason) == ('{"a": 1, ', "stop")
    assert stopped.choices[0]["stop_reason"] == '"b"'
    fixed = {"const": {"key": "value"}}
    cut = api.chat("Hi", **wanted(fixed), max_tokens=60, stop=["value", "never"])
    assert re.fullmatch(r'\s*\{\s*"key"\s*:\s*"', cut.text)


def test_case_43_three_answers_each_match(api: Api, closing: Json) -> None:
    schema = SCHEMAS["unions"]
    fields = {**wanted(schema), **closing, "n": 3, "temperature": 1, "seed": 2}
    answer = api.chat("Fill it in", **fields)
    assert len(answer.choices) == 3
    for content in answer.texts:
        check(content, schema)
    stream = api.stream("Fill it in", **fields)
    assert [stream.text(index) for index in range(3)] == answer.texts


@pytest.mark.parametrize("more", [{"ignore_eos": True}, {"min_tokens": 300}, {"ignore_eos": True, "min_tokens": 300}])
def test_case_43_a_grammar_ends_what_nothing_else_may(api: Api, closing: Json, more: Json) -> None:
    """Once nothing may follow, the answer ends, whatever `ignore_eos` and `min_tokens` say."""
    for schema in (SCHEMAS["references"], SCHEMAS["a list"]):
        answer = api.chat("Fill it in", **wanted(schema), **closing, **more)
        assert answer.reason == "stop"
        check(answer.text, schema)
        assert api.stream("Fill it in", **wanted(schema), **closing, **more).text() == answer.text


def test_case_43_in_a_crowd(api: Api, closing: Json) -> None:
    """Constrained and free answers in one batch are what they are alone."""
    free: Json = {"max_tokens": 30, "ignore_eos": True}
    requests: list[tuple[str, Json]] = []
    for schema in SCHEMAS.values():
        requests += [("Fill it in", {**wanted(schema), **closing, "temperature": 1, "seed": 1}), ("Tell me", free)]
    answers = api.all_at_once(requests)
    for (question, fields), answer in zip(requests, answers, strict=True):
        assert api.chat(question, **fields).text == answer.text
    for schema, answer in zip(SCHEMAS.values(), answers[::2], strict=True):
        check(answer.text, schema)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
        ({"response_format": {}}, "missing_required_parameter", "response_format.type"),
        ({"response_format": "json"}, "invalid_type", "response_format"),
        ({"response_format": {"type": "json_schema"}}, "missing_required_parameter", "response_format.json_schema"),
        ({"response_format": {"type": "structural_tag"}}, "unsupported_value", "response_format"),
        ({"structured_outputs": {}}, "invalid_value", "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "invalid_value", "structured_outputs"),
        ({"structured_outputs": {"json": {}, "json_object": True}}, "invalid_value", "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "empty_array", "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [3]}}, "invalid_type", "structured_outputs.choice[0]"),
        ({"structured_outputs": {"regex": 3}}, "invalid_type", "structured_outputs.regex"),
        ({"guided_choice": ["a"], "guided_regex": "b"}, "invalid_value", "guided_choice"),
        ({"guided_grammar": "start: ("}, "invalid_value", "guided_grammar"),
        ({"ebnf": 'root ::= "a"'}, "unsupported_parameter", "ebnf"),
        ({"bad_words": ["x"]}, "unsupported_parameter", "bad_words"),
        ({"allowed_token_ids": [5]}, "unsupported_parameter", "allowed_token_ids"),
    ],
)
def test_case_44_constraints_that_are_refused(api: Api, fields: Json, code: str, param: str) -> None:
    api.refuses_chat("Hi", **fields, code=code, param=param)


def test_case_44_older_spellings_constrain_too(api: Api, closing: Json) -> None:
    schema = SCHEMAS["references"]
    check(api.chat("Hi", guided_json=schema, **closing).text, schema)
    check(api.chat("Hi", guided_json=json.dumps(schema), **closing).text, schema)
    check(api.chat("Hi", structured_outputs={"json": schema}, **closing).text, schema)
    assert api.chat("Hi", guided_choice=["only this"], max_tokens=20).text == "only this"
    assert re.fullmatch("[ab]{3}", api.chat("Hi", guided_regex="[ab]{3}", max_tokens=20).text)
    assert re.fullmatch("[ab]{3}", api.chat("Hi", regex="[ab]{3}", max_tokens=20).text)
    assert re.fullmatch("x+y", api.chat("Hi", guided_grammar='start: "x"~3 "y"', max_tokens=20).text)


# --- tools ---------------------------------------------------------------------------------------------------------

WEATHER: Json = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather at a place.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}
CLOCK: Json = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
TOOLS = [WEATHER, CLOCK]
NAMED: Json = {"type": "function", "function": {"name": "get_weather"}}


def check_call(call: Json, tools: list[Json]) -> None:
    assert set(call) == {"id", "type", "function"}
    assert re.fullmatch(r"call_[A-Za-z0-9_-]+", call["id"])
    assert call["type"] == "function"
    parameters = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    check(call["function"]["arguments"], parameters[call["function"]["name"]])


def streamed_calls(stream: Stream) -> list[Json]:
    """Tool calls put together as clients do: what comes under one index is one call, strings are joined."""
    calls: list[Json] = []
    for choice in stream.choices(0):
        for piece in choice["delta"].get("tool_calls", ()):
            if piece["index"] == len(calls):
                assert set(piece) == {"index", "id", "type", "function"}
                assert piece["function"]["arguments"] == ""
                calls.append({key: piece[key] for key in ("id", "type")} | {"function": dict(piece["function"])})
            else:
                assert set(piece) == {"index", "function"}
                assert set(piece["function"]) == {"arguments"}
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    return calls


def calls_of(answer: Answer) -> list[Json]:
    calls: list[Json] = answer.choices[0]["message"].get("tool_calls", [])
    return calls


def test_case_45_a_named_function_is_called(api: Api, closing: Json, client: openai.OpenAI) -> None:
    fields = {"tools": TOOLS, "tool_choice": NAMED, **closing}
    answer = api.chat("Weather in Rome?", **fields)
    (call,) = calls_of(answer)
    check_call(call, TOOLS)
    assert call["function"]["name"] == "get_weather"
    assert answer.reason == "stop"
    assert answer.choices[0]["message"]["content"] is None
    stream = api.stream("Weather in Rome?", **fields)
    (streamed,) = streamed_calls(stream)
    assert streamed["function"] == call["function"]
    assert stream.reason() == "stop"
    spoken = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Weather in Rome?"}],
        temperature=0,
        **fields,
    )
    assert spoken.choices[0].message.tool_calls is not None
    assert spoken.choices[0].message.tool_calls[0].function.arguments == call["function"]["arguments"]


def test_case_45_some_function_must_be_called(api: Api, closing: Json) -> None:
    for seed in range(4):
        fields = {"tools": TOOLS, "tool_choice": "required", **closing, "temperature": 1, "seed": seed}
        answer = api.chat("What now?", **fields)
        calls = calls_of(answer)
        assert calls
        for call in calls:
            check_call(call, TOOLS)
        assert answer.reason == "tool_calls"
        assert len({call["id"] for call in calls}) == len(calls)
        streamed = streamed_calls(stream := api.stream("What now?", **fields))
        assert [call["function"] for call in streamed] == [call["function"] for call in calls]
        assert stream.reason() == "tool_calls"
        one = api.chat("What now?", **fields, parallel_tool_calls=False)
        assert len(calls_of(one)) == 1


def test_case_45_tools_that_need_not_be_called(api: Api) -> None:
    plain = api.chat("Hi")
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}, {"tool_choice": None}):
        answer = api.chat("Hi", tools=TOOLS, **choice)
        assert answer.texts == plain.texts
        assert calls_of(answer) == []
    assert api.chat("Hi", tool_choice="auto").texts == plain.texts
    assert api.chat("Hi", tool_choice="none").texts == plain.texts
    assert api.chat("Hi", functions=[{"name": "f"}], function_call="none").texts == plain.texts


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"tools": []}, "empty_array", "tools"),
        ({"tools": {}}, "invalid_type", "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "unsupported_value", "tools[0].type"),
        ({"tools": [{"type": "banana"}]}, "invalid_value", "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "missing_required_parameter", "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "x" * 65}}]},
            "string_above_max_length",
            "tools[0].function.name",
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}},
            "invalid_value",
            "tool_choice",
        ),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "unsupported_value", "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "invalid_value", "tool_choice"),
        ({"tools": TOOLS, "tool_choice": 3}, "invalid_type", "tool_choice"),
        ({"tool_choice": NAMED}, "invalid_value", "tool_choice"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "f"}}, "unsupported_parameter", "function_call"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"$ref": "https://a.example/x"}}}
                ],
                "tool_choice": "required",
            },
            "invalid_value",
            "tools[0].function.parameters",
        ),
    ],
)
def test_case_45_tools_that_are_refused(api: Api, fields: Json, code: str, param: str) -> None:
    api.refuses_chat("Hi", **fields, code=code, param=param)


def test_case_46_a_history_of_calls(api: Api) -> None:
    call: Json = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city":"Rome"}'},
    }
    result = {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees"}
    history = [user("Weather?"), {"role": "assistant", "content": None, "tool_calls": [call]}, result]
    answer = api.chat(history)
    assert answer.texts == api.chat(history).texts
    assert answer.prompt_tokens > api.chat(history[:2]).prompt_tokens
    for content in ([{"type": "text", "text": "18 degrees"}], "18 degrees"):
        variant = [*history[:2], result | {"content": content, "name": "get_weather"}]
        assert api.chat(variant).texts == answer.texts
    empty = [history[0], history[1] | {"content": ""}, result]
    assert api.chat(empty).texts == answer.texts
    api.chat([*history, user("And tomorrow?")], tools=TOOLS)
    # Arguments that are no JSON come from other models and are nobody's fault now.
    broken = call | {"function": {"name": "f", "arguments": "{not json"}}
    api.chat([history[0], {"role": "assistant", "tool_calls": [broken]}, result])
    api.chat([user("x"), {"role": "function", "name": "f", "content": "18"}])
    api.refuses_chat(
        [user("x"), {"role": "assistant", "tool_calls": {}}], code="invalid_type", param="messages[1].tool_calls"
    )
    api.refuses_chat(
        [user("x"), {"role": "assistant", "tool_calls": [{"id": "1"}]}],
        code="missing_required_parameter",
        param="messages[1].tool_calls[0].function",
    )
