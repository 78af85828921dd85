"""What tools come to: the grammar of calls, the words that the model is told, and who is blamed for a bad schema."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from server.api.chat.protocol import parse_chat_request
from server.api.chat.routes import to_chat_input
from server.api.tools import MAX_PARALLEL_CALLS
from server.errors import ClientError
from server.types import ChatInput, GrammarSpec, TextPart
from tests.api.chat.client import HELLO

ADD = {
    "type": "object",
    "properties": {"b": {"type": "integer"}, "a": {"type": "integer"}},
    "required": ["b", "a"],
    "additionalProperties": False,
}


def tool(name: str, parameters: Any = None, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **fields}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def chat(*, inject: bool = False, **fields: Any) -> ChatInput:
    request = parse_chat_request({"messages": HELLO, **fields})
    return to_chat_input(request, request_id="r", vocab_size=32003, inject_tools=inject)


def grammar(**fields: Any) -> GrammarSpec:
    found = chat(**fields).sampling.grammar
    assert found is not None
    return found


def calls_schema(**fields: Any) -> dict[str, Any]:
    found = grammar(tool_choice="required", **fields)
    assert found.kind == "json_schema"
    schema: dict[str, Any] = json.loads(found.source)
    jsonschema.Draft202012Validator.check_schema(schema)
    return schema


def is_valid(schema: dict[str, Any], *calls: tuple[str, Any]) -> bool:
    answer = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return jsonschema.Draft202012Validator(schema).is_valid(answer)


def test_a_named_function_gives_its_parameters() -> None:
    tools = [tool("f"), tool("g", ADD)]
    found = grammar(tools=tools, tool_choice=named("g"))
    source = '{"type":"object","properties":{"b":{"type":"integer"},"a":{"type":"integer"}},"required":["b","a"],"additionalProperties":false}'  # noqa: E501
    assert found == GrammarSpec("json_schema", source, "tools[1].function.parameters")


@pytest.mark.parametrize(
    ("parameters", "source"),
    [
        (None, '{"type":"object","properties":{},"additionalProperties":false}'),
        ({}, '{"type":"object"}'),
        ({"properties": {"x": {}}}, '{"type":"object","properties":{"x":{}}}'),
        ({"$ref": "#/$defs/x", "$defs": {"x": {}}}, '{"$ref":"#/$defs/x","$defs":{"x":{}}}'),
        ({"anyOf": [{"type": "object"}]}, '{"anyOf":[{"type":"object"}]}'),
    ],
)
def test_arguments_are_an_object(parameters: Any, source: str) -> None:
    assert grammar(tools=[tool("f", parameters)], tool_choice=named("f")).source == source


@pytest.mark.parametrize("choice", ["required", named("g")])
def test_parameters_of_another_type(choice: Any) -> None:
    with pytest.raises(ClientError) as caught:
        chat(tools=[tool("f"), tool("g", {"type": "array"})], tool_choice=choice)
    assert (caught.value.param, caught.value.code) == ("tools[1].function.parameters", "invalid_value")


def test_a_required_call_is_of_one_of_the_functions() -> None:
    schema = calls_schema(tools=[tool("f"), tool("add", ADD)])
    assert is_valid(schema, ("f", {}))
    assert is_valid(schema, ("add", {"b": 1, "a": 2}), ("f", {}))
    assert is_valid(schema, *[("f", {})] * MAX_PARALLEL_CALLS)
    assert not is_valid(schema)
    assert not is_valid(schema, *[("f", {})] * (MAX_PARALLEL_CALLS + 1))
    assert not is_valid(schema, ("g", {}))
    assert not is_valid(schema, ("f", {"b": 1, "a": 2}))
    assert not is_valid(schema, ("add", {"b": 1}))
    validator = jsonschema.Draft202012Validator(schema)
    assert not validator.is_valid({"name": "f", "arguments": {}})
    assert not validator.is_valid([{"name": "f"}])
    assert not validator.is_valid([{"name": "f", "arguments": {}, "x": 1}])


def test_the_name_comes_first() -> None:
    """Nobody can be told of a call before its name."""
    items = calls_schema(tools=[tool("f")])["items"]
    assert list(items["properties"]) == ["name", "arguments"]


def test_no_parallel_calls() -> None:
    schema = calls_schema(tools=[tool("f"), tool("g")], parallel_tool_calls=False)
    assert is_valid(schema, ("g", {}))
    assert not is_valid(schema, ("g", {}), ("f", {}))
    assert not is_valid(schema)


TREE = {
    "$id": "https://example.com/tree",
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "kids": {"type": "array", "items": {"$ref": "#"}},
        "leaf": {"$ref": "#/$defs/leaf"},
        "$ref": {"type": "integer"},
        "const": {"$ref": "#/definitions/odd"},
        "kind": {"const": {"$ref": "#/$defs/leaf"}},
        "pair": {"enum": [{"$ref": "#"}]},
    },
    "patternProperties": {"^x": {"$ref": "#/$defs/leaf"}},
    "additionalProperties": False,
    "$defs": {"leaf": {"anyOf": [{"type": "string"}, {"$ref": "#/definitions/odd"}]}},
    "definitions": {"odd": {"type": "boolean"}},
}


def test_references_hold_where_the_schema_is_moved_to() -> None:
    schema = calls_schema(tools=[tool("f", ADD), tool("t", TREE)])
    good = [
        {"kids": [{"kids": [], "leaf": "x"}]},
        {"leaf": True},
        {"const": True},
        {"$ref": 5},
        {"kind": {"$ref": "#/$defs/leaf"}},
        {"pair": {"$ref": "#"}},
        {"xyz": "x"},
    ]
    bad = [
        {"kids": [{"kids": 1}]},
        {"leaf": 5},
        {"const": 5},
        {"$ref": "x"},
        {"kind": {"$ref": "#/$defs/tool1/$defs/leaf"}},
        {"xyz": 5},
        {"other": 1},
    ]
    alone = jsonschema.Draft202012Validator(TREE)
    for arguments in good:
        assert alone.is_valid(arguments)
        assert is_valid(schema, ("t", arguments)), arguments
    for arguments in bad:
        assert not alone.is_valid(arguments)
        assert not is_valid(schema, ("t", arguments)), arguments


def test_functions_whose_schemas_have_one_id() -> None:
    """As generators write it that know one function at a time."""
    one, two = ({"$id": "urn:x", "$ref": "#/$defs/a", "$defs": {"a": {"type": kind}}} for kind in ("object", "null"))
    schema = calls_schema(tools=[tool("f", one), tool("g", two)])
    assert is_valid(schema, ("f", {}), ("g", None))
    assert not is_valid(schema, ("f", None))
    assert not is_valid(schema, ("g", {}))


def test_a_schema_with_an_id_of_its_own_inside_is_left_alone() -> None:
    inner = {"$id": "https://example.com/x", "$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}}}
    schema = calls_schema(tools=[tool("f", {"type": "object", "properties": {"x": inner}, "required": ["x"]})])
    assert is_valid(schema, ("f", {"x": None}))
    assert not is_valid(schema, ("f", {"x": 1}))


def test_whose_fault_it_is() -> None:
    """With one function it is plain; with several, each is tried by itself when all together do not compile."""
    assert grammar(tools=[tool("f")], tool_choice="required").param == "tools[0].function.parameters"
    request = parse_chat_request({"messages": HELLO, "tools": [tool("f"), tool("g", ADD)], "tool_choice": "required"})
    plan = request.tool_plan(inject_tools=False)
    assert plan is not None
    assert (found := plan.grammar()) is not None
    assert found.param == "tools"
    assert [spec.param for spec in plan.suspects()] == [f"tools[{index}].function.parameters" for index in (0, 1)]
    assert json.loads(plan.suspects()[1].source) == ADD


def test_size() -> None:
    large = {"type": "object", "properties": {"x": {"const": "a" * 40_000}}}
    assert grammar(tools=[tool("f", large)], tool_choice="required")
    for choice, sizes, param in [
        ("required", (1, 1), "tools"),
        ("required", (1, 2), "tools[1].function.parameters"),
        (named("f1"), (1, 2), "tools[1].function.parameters"),
    ]:
        tools = [
            tool(f"f{index}", {"type": "object", "properties": {"x": {"const": "a" * 40_000 * size}}})
            for index, size in enumerate(sizes)
        ]
        with pytest.raises(ClientError) as caught:
            chat(tools=tools, tool_choice=choice)
        assert (caught.value.param, caught.value.code) == (param, "invalid_value")
    # Where the arguments' schema is not used, its size is nobody's business.
    assert chat(tools=tools).sampling.grammar is None


@pytest.mark.parametrize("choice", ["required", named("f")])
def test_a_forced_call_and_other_constraints(choice: Any) -> None:
    """`response_format` speaks of the content, of which there is none; the others of the answer itself."""
    fields = {"tools": [tool("f")], "tool_choice": choice}
    assert grammar(**fields, response_format={"type": "json_object"}) == grammar(**fields)
    with pytest.raises(ClientError) as caught:
        chat(**fields, guided_regex="a")
    assert (caught.value.param, caught.value.code) == ("guided_regex", "invalid_value")


@pytest.mark.parametrize("choice", [None, "auto", "none"])
@pytest.mark.parametrize("inject", [False, True])
def test_calls_that_need_not_be_made_constrain_nothing(choice: str | None, *, inject: bool) -> None:
    assert chat(inject=inject, tools=[tool("f", {"type": "array"})], tool_choice=choice).sampling.grammar is None


# -- what the model is told ------------------------------------------------------------------------------------------


def told(**fields: Any) -> str:
    """The words before the conversation; empty where there are none."""
    turns = chat(**fields).turns
    if len(turns) == 1:
        return ""
    first, second = turns
    assert (first.role, second.parts) == ("system", (TextPart("Hi"),))
    (part,) = first.parts
    assert isinstance(part, TextPart)
    return part.text


TOOLS = [tool("f", description="Does {this}."), tool("add", ADD)]


@pytest.mark.parametrize("choice", [None, "auto", "none", "required", named("f")])
def test_nothing_is_told_unless_the_operator_wants_it(choice: Any) -> None:
    assert told(tools=TOOLS, tool_choice=choice) == ""


def test_functions_that_may_be_called() -> None:
    text = told(inject=True, tools=TOOLS)
    first, *definitions, form, otherwise = text.splitlines()
    assert first == "You may call these functions:"
    assert [json.loads(line) for line in definitions] == [
        {
            "name": "f",
            "description": "Does {this}.",
            "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
        },
        {"name": "add", "description": "", "parameters": ADD},
    ]
    assert '[{"name": "a function", "arguments": {its arguments}}]' in form
    assert otherwise == "Otherwise answer in words."


def test_functions_that_must_be_called() -> None:
    assert told(inject=True, tools=TOOLS, tool_choice="required").count('"name"') == 3
    text = told(inject=True, tools=TOOLS, tool_choice=named("add"))
    assert '"add"' in text
    assert '"f"' not in text


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "none"},
        {"response_format": {"type": "json_object"}},  # then no call could be written
        {"guided_choice": ["a"]},
    ],
)
def test_functions_that_cannot_be_called_are_not_told(fields: dict[str, Any]) -> None:
    assert told(inject=True, tools=TOOLS, **fields) == ""
