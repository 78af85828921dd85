"""The `openai` package's structured answers and tools: `.parse()`, the stream helper, function calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.clients.talk import MODEL, Document, Kind, Verdict, Weather, picture, picture_url, user
from tests.serving import Server

pytestmark = pytest.mark.clients

WEATHER = openai.pydantic_function_tool(Weather, name="get_weather", description="The weather.")
NEWS = openai.pydantic_function_tool(Verdict, name="judge", description="A judgement.")


class Node(BaseModel):
    """A schema that refers to itself."""

    kind: Kind
    children: list[Node]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="EMPTY", max_retries=0) as made:
        yield made


@pytest.mark.parametrize("model", [Document, Node])
@pytest.mark.parametrize("temperature", [0, 1])
def test_parse_gives_an_object_of_the_model(
    client: openai.OpenAI, closing: dict[str, int], model: type[BaseModel], temperature: float
) -> None:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=[user(picture(picture_url(), "low"), "What is this?")],
        response_format=model,
        temperature=temperature,
        seed=1,
        logit_bias=closing,
        max_completion_tokens=600,
    )
    assert isinstance(answer.choices[0].message.parsed, model)
    assert answer.choices[0].finish_reason == "stop"


def test_parse_gives_every_choice_an_object_of_its_own(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=[user("Judge")], response_format=Verdict, n=4, seed=2, max_completion_tokens=200
    )
    assert len(answer.choices) == 4
    assert all(isinstance(choice.message.parsed, Verdict) for choice in answer.choices)
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_parse_says_when_the_answer_was_cut_off(client: openai.OpenAI, closing: dict[str, int]) -> None:
    with pytest.raises(openai.LengthFinishReasonError) as caught:
        client.chat.completions.parse(
            model=MODEL,
            messages=[user("What is this?")],
            response_format=Document,
            logit_bias=closing,
            max_completion_tokens=5,
        )
    assert caught.value.completion.usage is not None
    assert caught.value.completion.usage.completion_tokens == 5


def test_the_stream_helper_parses_too(client: openai.OpenAI, closing: dict[str, int]) -> None:
    with client.chat.completions.stream(
        model=MODEL,
        messages=[user("What is this?")],
        response_format=Document,
        temperature=0,
        logit_bias=closing,
        max_completion_tokens=600,
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    done = [event for event in events if event.type == "content.done"]
    assert len(done) == 1
    assert isinstance(done[0].parsed, Document)
    assert final.choices[0].message.parsed == done[0].parsed
    assert sum(event.type == "content.delta" for event in events) > 10


def test_json_object_is_json(client: openai.OpenAI, closing: dict[str, int]) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[user("As JSON, please.")],
        response_format={"type": "json_object"},
        logit_bias=closing,
        max_completion_tokens=300,
    )
    assert answer.choices[0].finish_reason == "stop"
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


def test_a_schema_that_cannot_be_kept_to_is_refused(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"x": {"$ref": "https://example.com/schema.json"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL,
            messages=[user("x")],
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )
    assert (caught.value.param or "").startswith("response_format")


@pytest.mark.parametrize(
    ("choice", "finish"),
    [({"type": "function", "function": {"name": "get_weather"}}, "stop"), ("required", "tool_calls")],
    ids=["named", "required"],
)
def test_a_function_is_called_with_arguments_that_parse(client: openai.OpenAI, choice: Any, finish: str) -> None:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=[user("Is it raining?")],
        tools=[WEATHER],
        tool_choice=choice,
        parallel_tool_calls=False,
        seed=3,
        max_completion_tokens=400,
    )
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == finish
    assert not message.content
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert call.function.name == "get_weather"
    assert isinstance(call.function.parsed_arguments, Weather)
    history = [
        user("Is it raining?"),
        message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "It is."},
    ]
    after = client.chat.completions.create(model=MODEL, messages=history, tools=[WEATHER], max_completion_tokens=5)
    assert after.choices[0].finish_reason in ("stop", "length")


def test_several_functions_are_called_each_with_its_own_arguments(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=[user("Do it")],
        tools=[WEATHER, NEWS],
        tool_choice="required",
        n=4,
        seed=1,
        max_completion_tokens=900,
    )
    calls = [call for choice in answer.choices for call in choice.message.tool_calls or []]
    expected: dict[str, type[BaseModel]] = {"get_weather": Weather, "judge": Verdict}
    assert {call.function.name for call in calls} == set(expected)
    assert all(isinstance(call.function.parsed_arguments, expected[call.function.name]) for call in calls)
    assert len({call.id for call in calls}) == len(calls)


@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "get_weather"}}, "required"])
def test_a_call_streams_its_arguments(client: openai.OpenAI, choice: Any) -> None:
    with client.chat.completions.stream(
        model=MODEL,
        messages=[user("Is it raining?")],
        tools=[WEATHER],
        tool_choice=choice,
        parallel_tool_calls=False,
        seed=4,
        max_completion_tokens=400,
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert len(done) == 1
    assert done[0].name == "get_weather"
    assert isinstance(done[0].parsed_arguments, Weather)
    assert "".join(event.arguments_delta for event in deltas) == done[0].arguments
    calls = final.choices[0].message.tool_calls
    assert calls is not None
    assert len(calls) == 1
    assert calls[0].id
    assert calls[0].type == "function"


def test_tools_that_need_not_be_called(client: openai.OpenAI) -> None:
    for choice in ("auto", "none"):
        answer = client.chat.completions.create(
            model=MODEL, messages=[user("Hello")], tools=[WEATHER], tool_choice=choice, max_completion_tokens=8
        )
        assert answer.choices[0].message.content is not None
        assert answer.choices[0].message.tool_calls is None


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    ],
)
def test_tools_that_make_no_sense_are_refused(client: openai.OpenAI, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[user("x")], **options)
    assert (caught.value.param or "").startswith(param)
