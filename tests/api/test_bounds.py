"""Every field of every body has bounds, whatever is added later; and a body is refused before it takes long to read."""

from __future__ import annotations

import json
import math
import re
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Union

import annotated_types
import httpx
import pytest
from pydantic import BaseModel, PlainValidator
from pydantic.fields import FieldInfo

import server.api.app
from server.api.body import MAX_SEPARATORS
from server.api.chat.messages import MAX_MESSAGES, MAX_PARTS, MAX_TOOL_CALLS, parse_messages
from server.api.chat.protocol import parse_chat_request
from server.api.completions.protocol import MAX_PROMPTS, parse_completion_request, parse_prompts
from server.api.protocol import Body
from server.api.responses.input import parse_input
from server.api.responses.protocol import parse_metadata, parse_responses_request
from server.api.sampling import parse_logit_bias, parse_stop
from server.api.structured import MAX_SOURCE_BYTES
from server.api.tokenize import MAX_DETOKENIZED, _parse_tokens
from server.errors import ClientError

# Fields whose bounds are not to be seen in their types → what bounds them.
SOURCES = frozenset(  # in bytes, by `check_size`; shown below
    {
        *("guided_json", "guided_regex", "guided_grammar", "regex", "schema_", "value", "json_", "grammar"),
        "parameters",
        "guided_choice[]",
        "choice[]",
    }
)
TEXTS = frozenset({"prompt", "instructions"})  # by the context, unread: tests/inputs/test_processor.py
NAMES = frozenset({"include[]"})  # compared and nothing else
UNREAD = frozenset({"service_tier", "reasoning", "structural_tag"})
OWN_BOUNDS = frozenset({"tool_choice", "request_id", "mm_processor_kwargs"})  # looked into by hand; shown below

NUMBERS = (int, float)
_ENDS = re.compile(r"\{\d+,\d+\}\$$")  # a pattern that says how long the whole may be


def bodies() -> list[type[Body]]:
    """All that a client can send to any endpoint of the application, and what is in it."""
    assert server.api.app  # imports every endpoint
    found: list[type[Body]] = []
    pending = Body.__subclasses__()
    while pending:
        kind = pending.pop()
        if kind not in found:
            found.append(kind)
            pending += kind.__subclasses__()
    return sorted((kind for kind in found if kind.__module__.startswith("server.")), key=lambda kind: kind.__name__)


def fields() -> list[tuple[str, str, FieldInfo]]:
    return [
        (kind.__name__, name, field)
        for kind in bodies()
        for name, field in kind.model_fields.items()
        if name in kind.__annotations__ or not any(name in base.__annotations__ for base in kind.__mro__[1:-1])
    ]


def unbounded(name: str, annotation: Any, metadata: list[Any]) -> Iterator[str]:
    """What is missing from a type; `name` gets [] for what is within an array."""
    if name in SOURCES | TEXTS | NAMES | UNREAD | OWN_BOUNDS:
        return
    if any(isinstance(item, PlainValidator) for item in metadata):
        return  # read by hand; shown below
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        yield from unbounded(name, arguments[0], [*metadata, *arguments[1:]])
    elif origin in (Union, type(int | str)):
        for argument in arguments:
            yield from unbounded(name, argument, metadata)
    elif annotation in NUMBERS:
        flat = list(flattened(metadata))
        if not any(isinstance(item, annotated_types.Ge | annotated_types.Gt) for item in flat):
            yield f"{name}: no lower bound"
        if not any(isinstance(item, annotated_types.Le | annotated_types.Lt) for item in flat):
            yield f"{name}: no upper bound"
        if annotation is float and not any(getattr(item, "allow_inf_nan", None) is False for item in flat):
            yield f"{name}: NaN"
    elif annotation is str:
        flat = list(flattened(metadata))
        has_length = any(isinstance(item, annotated_types.MaxLen) for item in flat)
        if not has_length and not any(_ENDS.search(getattr(item, "pattern", None) or "") for item in flat):
            yield f"{name}: no length"
    elif origin in (list, tuple):
        if not any(isinstance(item, annotated_types.MaxLen) for item in flattened(metadata)):
            yield f"{name}: no length"
        for argument in arguments:
            yield from unbounded(f"{name}[]", argument, [])
    elif origin is Literal or annotation in (bool, type(None)):
        return
    elif not (isinstance(annotation, type) and issubclass(annotation, Body)):
        yield f"{name}: {annotation}"


def flattened(metadata: list[Any]) -> Iterator[Any]:
    for item in metadata:
        yield item
        if isinstance(item, FieldInfo):
            yield from item.metadata


def test_there_are_bodies_to_look_at() -> None:
    assert len(bodies()) >= 15
    assert len(fields()) >= 90


@pytest.mark.parametrize(("body", "name", "field"), fields(), ids=lambda value: value if isinstance(value, str) else "")
def test_every_field_is_bounded(body: str, name: str, field: FieldInfo) -> None:
    assert list(unbounded(name, field.annotation, list(field.metadata))) == [], body


@pytest.mark.parametrize("body", bodies(), ids=lambda body: body.__name__)
def test_no_body_turns_one_type_into_another(body: type[BaseModel]) -> None:
    assert body.model_config["strict"] is True
    assert body.model_config["frozen"] is True


def test_a_field_without_bounds_is_noticed() -> None:
    def missing(annotation: Any) -> list[str]:
        return list(unbounded("x", annotation, []))

    assert missing(int) == ["x: no lower bound", "x: no upper bound"]
    assert len(missing(float | None)) == 3
    assert missing(str) == missing(list[bool]) == ["x: no length"]
    assert missing(list[int])[1:] == ["x[]: no lower bound", "x[]: no upper bound"]
    assert len(missing(Any)) == len(missing(dict[str, Any])) == 1


# -- what is read by hand ----------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "x"}
CALL = {"function": {"name": "a", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("parse", "value"),
    [
        (parse_messages, [USER] * (MAX_MESSAGES + 1)),
        (parse_messages, [{"role": "user", "content": ["x"] * (MAX_PARTS + 1)}]),
        (parse_messages, [{"role": "user", "content": ["x"] * (MAX_PARTS // 2 + 1)}] * 2),
        (parse_messages, [{"role": "assistant", "tool_calls": [CALL] * (MAX_TOOL_CALLS + 1)}]),
        (parse_input, [USER] * (MAX_MESSAGES + 1)),
        (
            parse_input,
            [{"type": "function_call", "call_id": "c", "name": "a", "arguments": "{}"}] * (MAX_TOOL_CALLS + 1),
        ),
        (parse_prompts, ["x"] * (MAX_PROMPTS + 1)),
        (parse_prompts, [2**31]),
        (parse_prompts, [-1]),
        (_parse_tokens, [1] * (MAX_DETOKENIZED + 1)),
        (_parse_tokens, [2**63]),
        (parse_metadata, {str(index): "x" for index in range(17)}),
        (parse_metadata, {"x" * 65: "x"}),
        (parse_metadata, {"x": "x" * 513}),
        (parse_stop, ["x"] * 5),
        (parse_stop, "x" * 1025),
        (parse_logit_bias, {str(index): 1 for index in range(301)}),
        (parse_logit_bias, {"1": 100.5}),
        (parse_logit_bias, {"1": math.nan}),
        (parse_logit_bias, {"1": math.inf}),
        (parse_logit_bias, {"9" * 11: 1}),
    ],
)
def test_what_is_read_by_hand_is_bounded(parse: Callable[[Any], Any], value: Any) -> None:
    with pytest.raises(ClientError):
        parse(value)


LONG = "a" * MAX_SOURCE_BYTES


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_json": {"const": LONG}},
        {"guided_json": f'{{"const":"{LONG}"}}'},
        {"guided_json": {"enum": [0] * MAX_SOURCE_BYTES}},
        {"guided_regex": LONG + "a"},
        {"guided_grammar": LONG + "a"},
        {"guided_choice": [LONG]},
        {"guided_choice": ["a"] * 4097},
        {"regex": LONG + "a"},
        {"grammar": {"type": "regex", "value": LONG + "a"}},
        {"grammar": {"type": "json", "value": {"const": LONG}}},
        {"structured_outputs": {"json": {"const": LONG}}},
        {"structured_outputs": {"grammar": LONG + "a"}},
        {"structured_outputs": {"choice": [LONG]}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": LONG}}}},
        {"response_format": {"type": "json_object", "schema": {"const": LONG}}},
        {"response_format": {"type": "regex", "value": LONG + "a"}},
    ],
)
def test_sources_of_grammars_are_bounded_in_bytes(fields: dict[str, Any]) -> None:
    from server.api.structured import find_grammar

    with pytest.raises(ClientError):
        find_grammar(parse_chat_request({"messages": [USER], **fields}))


def tools(count: int, parameters: dict[str, Any]) -> dict[str, Any]:
    function = {"name": "f", "parameters": parameters}
    return {"tools": [{"type": "function", "function": {**function, "name": f"f{index}"}} for index in range(count)]}


@pytest.mark.parametrize(
    "fields",
    [
        tools(129, {}),
        {**tools(1, {"const": LONG}), "tool_choice": "required"},
        {**tools(128, {"const": "a" * 1000}), "tool_choice": "required"},
        {**tools(1, {"const": LONG}), "tool_choice": {"type": "function", "function": {"name": "f0"}}},
    ],
)
def test_tools_are_bounded_together(fields: dict[str, Any]) -> None:
    def read() -> None:
        plan = parse_chat_request({"messages": [USER], **fields}).tool_plan(inject_tools=True)
        assert plan is not None
        plan.grammar()

    with pytest.raises(ClientError):
        read()


def test_what_a_client_calls_its_request_is_never_long() -> None:
    for given in ("x" * 129, "x" * 10**6, {"a": 1}, [1], 5):
        assert len(parse_chat_request({"messages": [USER], "request_id": given}).answer_id("chatcmpl")) < 50


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e309", "-1e309"])
def test_no_number_is_infinite_or_none(url: str, text: str) -> None:
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        content = json.dumps({"messages": [USER]})[:-1] + f', "{name}": {text}}}'
        answer = post(url, content.encode())
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] in (name, None)


# -- bodies that would take long ---------------------------------------------------------------------------------------


def post(url: str, content: bytes) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return httpx.post(f"{url}/v1/chat/completions", content=content, headers=headers, timeout=30)


def with_field(text: str) -> bytes:
    return f'{{"messages": {json.dumps([USER])}, "x": {text}}}'.encode()


def array(item: str, count: int) -> str:
    return f"[{','.join([item] * count)}]"


@pytest.mark.parametrize(
    "text",
    [
        array("0", MAX_SEPARATORS),
        array("[]", MAX_SEPARATORS // 2 + 1),
        array("{}", MAX_SEPARATORS // 2 + 1),
        array("[[[[]]]]", MAX_SEPARATORS // 5 + 1),
        "{" + ",".join(f'"{index}":0' for index in range(MAX_SEPARATORS)) + "}",
        json.dumps("[],{}," * (MAX_SEPARATORS // 4)),
    ],
    ids=["numbers", "arrays", "objects", "nested", "keys", "in a text"],
)
def test_a_body_of_too_many_values_is_refused_unread(url: str, text: str) -> None:
    answer = post(url, with_field(text))
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "too_many_values"
    assert str(MAX_SEPARATORS) in error["message"]


def test_a_body_of_many_values_is_read(url: str) -> None:
    assert post(url, with_field(array("0", MAX_SEPARATORS - 20))).status_code == 200
    assert post(url, with_field(json.dumps("x" * 3_000_000))).status_code == 200  # a picture's data, for example


def test_all_that_may_be_detokenized_is_not_too_much() -> None:
    assert MAX_DETOKENIZED + 10 < MAX_SEPARATORS


@pytest.mark.parametrize(
    ("parse", "body"),
    [
        (parse_chat_request, {"messages": [USER]}),
        (parse_completion_request, {"prompt": "x"}),
        (parse_responses_request, {"input": "x"}),
    ],
)
def test_nobody_reads_what_nobody_knows(parse: Callable[[dict[str, Any]], Any], body: dict[str, Any]) -> None:
    deep: Any = []
    for _ in range(190):
        deep = [deep]
    template = {"messages": [], "bos_token": "<image>", "add_generation_prompt": False, "enable_thinking": True}
    assert parse({**body, "chat_template_kwargs": template}) == parse(body)
    assert parse({**body, "x": deep, "y": {"z": deep}, "__class__": 1, "model_config": {}, "self": 2}) == parse(body)
