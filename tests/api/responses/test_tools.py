"""Function tools of a responses request: how they are asked for, what constrains the answer, which items come."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from server.types import FinishReason, Logprob, TextPart
from tests.api.responses.client import ask, post, stream
from tests.api.scripted_llm import UNCOMPILABLE, ScriptedLLM, say, serving

WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "Today's weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
TIME = {"type": "function", "name": "time"}
CALLS = (
    say('[{"name": "weather", "argu'),
    say('ments": {"city": "Os'),
    say('lo"}}, {"name":"time","arguments":{}}]'),
    say("", FinishReason.STOP),
)
NAMED = {"type": "function", "name": "weather"}
CALL_EVENTS = [
    *("response.output_item.added", "response.function_call_arguments.delta"),
    *("response.function_call_arguments.done", "response.output_item.done"),
]


@pytest.fixture(scope="module")
def settings(injects: bool) -> dict[str, Any]:
    return {"inject_tools": injects}


def named(item: dict[str, Any]) -> tuple[str, str, str]:
    return item["name"], item["arguments"], item["status"]


def test_required(llm: ScriptedLLM, url: str) -> None:
    llm.script = CALLS
    body = ask(url, tools=[WEATHER, TIME], tool_choice="required")
    assert [item["type"] for item in body["output"]] == ["function_call"] * 2
    assert [named(item) for item in body["output"]] == [
        ("weather", '{"city": "Oslo"}', "completed"),
        ("time", "{}", "completed"),
    ]
    ids = {item[key] for item in body["output"] for key in ("id", "call_id")}
    assert len(ids) == 4
    assert (body["status"], body["tool_choice"]) == ("completed", "required")
    grammar = llm.chats[0].sampling.grammar
    assert grammar is not None
    assert (grammar.kind, grammar.param) == ("json_schema", "tools")


def test_named(llm: ScriptedLLM, url: str) -> None:
    llm.script = (say('{"city":'), say('"Oslo"}'), say("", FinishReason.STOP))
    body = ask(url, tools=[WEATHER, TIME], tool_choice=NAMED)
    assert [named(item) for item in body["output"]] == [("weather", '{"city":"Oslo"}', "completed")]
    assert body["tool_choice"] == NAMED
    grammar = llm.chats[0].sampling.grammar
    assert grammar is not None
    assert json.loads(grammar.source) == WEATHER["parameters"]
    assert grammar.param == "tools[0].parameters"


def test_cut_off_in_a_call(llm: ScriptedLLM, url: str) -> None:
    llm.script = (*CALLS[:1], say('ments": {"city": "Os', FinishReason.LENGTH))
    body = ask(url, tools=[WEATHER], tool_choice="required")
    assert [named(item) for item in body["output"]] == [("weather", '{"city": "Os', "incomplete")]
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_only_the_last_call_is_cut_off(llm: ScriptedLLM, url: str) -> None:
    llm.script = (*CALLS[:2], say('lo"}}, {"name":"time","arguments":{', FinishReason.LENGTH))
    whole = ask(url, tools=[WEATHER, TIME], tool_choice="required")["output"]
    streamed = stream(url, tools=[WEATHER, TIME], tool_choice="required")
    expected = [("weather", '{"city": "Oslo"}', "completed"), ("time", "{", "incomplete")]
    assert [named(item) for item in whole] == expected
    assert [named(item) for item in streamed[-1]["response"]["output"]] == expected
    assert [named(e["item"]) for e in streamed if e["type"] == "response.output_item.done"] == expected


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_neither_words_nor_calls(llm: ScriptedLLM, url: str, choice: str) -> None:
    llm.script = (say("  "), say("", FinishReason.LENGTH))
    for response in (
        ask(url, tools=[WEATHER], tool_choice=choice),
        stream(url, tools=[WEATHER], tool_choice=choice)[-1]["response"],
    ):
        assert [(item["type"], item["content"][0]["text"].strip()) for item in response["output"]] == [("message", "")]


def test_cut_off_before_a_call(llm: ScriptedLLM, url: str) -> None:
    llm.script = (say('[{"na', FinishReason.LENGTH),)
    body = ask(url, tools=[WEATHER], tool_choice="required")
    (item,) = body["output"]
    assert (item["type"], item["status"], item["content"][0]["text"]) == ("message", "incomplete", '[{"na')


def test_streamed(llm: ScriptedLLM, url: str) -> None:
    llm.script = CALLS
    events = stream(url, tools=[WEATHER, TIME], tool_choice="required")
    expected = ["response.created", "response.in_progress", *CALL_EVENTS[:1], *CALL_EVENTS[1:2] * 3]
    expected += [*CALL_EVENTS[2:], *CALL_EVENTS[:1], *CALL_EVENTS[1:2] * 2, *CALL_EVENTS[2:], "response.completed"]
    assert [event["type"] for event in events] == expected
    output = events[-1]["response"]["output"]
    assert [named(item) for item in output] == [
        ("weather", '{"city": "Oslo"}', "completed"),
        ("time", "{}", "completed"),
    ]
    for index, item in enumerate(output):
        own = [event for event in events if event.get("output_index") == index]
        assert own[0]["item"] == {**item, "status": "in_progress", "arguments": ""}
        assert {event["item_id"] for event in own[1:-1]} == {item["id"]}
        assert "".join(event["delta"] for event in own if event["type"] == CALL_EVENTS[1]) == item["arguments"]
        assert all("logprobs" not in event and "content_index" not in event for event in own)
        assert (own[-2]["name"], own[-2]["arguments"]) == (item["name"], item["arguments"])
        assert own[-1]["item"] == item


def test_sdk_stream_and_parse(llm: ScriptedLLM, client: openai.OpenAI) -> None:
    class Weather(BaseModel):
        city: str

    tools: list[Any] = [openai.pydantic_function_tool(Weather, name="weather")["function"] | {"type": "function"}]
    llm.script = (say('{"city":'), say('"Oslo"}'), say("", FinishReason.STOP))
    with client.responses.stream(
        model="idefics2-8b", input="Hi", tools=tools, tool_choice={"type": "function", "name": "weather"}
    ) as events:
        snapshots = [e.snapshot for e in events if e.type == "response.function_call_arguments.delta"]
        final = events.get_final_response()
    assert snapshots == ['{"city":', '{"city":"Oslo"}']
    assert final.output[0].type == "function_call"
    assert final.output[0].parsed_arguments == {"city": "Oslo"}


def test_auto(llm: ScriptedLLM, url: str, *, injects: bool) -> None:
    """A model that was not told of tools cannot mean a call, whatever its answer looks like."""
    llm.script = CALLS
    body = ask(url, tools=[WEATHER, TIME])
    assert llm.chats[0].sampling.grammar is None
    if injects:
        assert [item["type"] for item in body["output"]] == ["function_call"] * 2
        system = llm.chats[0].turns[0]
        assert system.role == "system"
        assert isinstance(system.parts[0], TextPart)
        assert '"weather"' in system.parts[0].text
        assert [turn.role for turn in llm.chats[0].turns] == ["system", "user"]
    else:
        assert [item["type"] for item in body["output"]] == ["message"]
        assert body["output"][0]["content"][0]["text"].startswith('[{"name": "weather"')
        assert [turn.role for turn in llm.chats[0].turns] == ["user"]


@pytest.mark.parametrize("streamed", [False, True])
def test_auto_in_words(llm: ScriptedLLM, url: str, *, streamed: bool) -> None:
    logprobs = [Logprob(token_id=i, token=str(i), data=b"x", logprob=-1.0) for i in range(3)]
    llm.script = (
        say("[", logprobs=logprobs[:1]),
        say("sic] Two", logprobs=logprobs[1:2]),
        say(" cats.", FinishReason.STOP, logprobs=logprobs[2:]),
    )
    fields = {"tools": [WEATHER], "include": ["message.output_text.logprobs"]}
    response = stream(url, **fields)[-1]["response"] if streamed else ask(url, **fields)
    (item,) = response["output"]
    content = item["content"][0]
    assert content["text"] == "[sic] Two cats."
    assert [entry["token"] for entry in content["logprobs"]] == ["0", "1", "2"]


def test_words_after_calls(llm: ScriptedLLM, url: str, *, injects: bool) -> None:
    """A call's tokens have no place among the log-probabilities, and must not be told as those of the words."""
    called, tail = (Logprob(token_id=1, token=token, data=b"x", logprob=-1.0) for token in ("call", "done"))
    texts = ('[{"name": "weather", "argu', 'ments": {}}, {"name":"time","arguments":{', "}", "}", "]")
    calls = [say(text, logprobs=(called,)) for text in texts]
    llm.script = (*calls, say(" Done.", logprobs=(tail,)), say("", FinishReason.STOP))
    fields = {"tools": [WEATHER, TIME], "include": ["message.output_text.logprobs"]}
    events = stream(url, **fields)
    output = events[-1]["response"]["output"]
    if not injects:
        assert [item["type"] for item in output] == ["message"]
        return
    assert [item["type"] for item in output] == ["function_call", "function_call", "message"]
    assert output[2]["content"][0]["text"] == "Done."
    assert [entry["token"] for entry in output[2]["content"][0]["logprobs"]] == ["done"]
    assert [event["output_index"] for event in events if event["type"] == "response.output_item.done"] == [0, 1, 2]
    assert [event["delta"] for event in events if event["type"] == "response.output_text.delta"] == ["Done."]


def test_not_parallel(llm: ScriptedLLM, url: str) -> None:
    llm.script = CALLS
    body = ask(url, tools=[WEATHER, TIME], tool_choice="required", parallel_tool_calls=False)
    assert [item["name"] for item in body["output"]] == ["weather"]
    grammar = llm.chats[0].sampling.grammar
    assert grammar is not None
    assert json.loads(grammar.source)["maxItems"] == 1


def test_none(llm: ScriptedLLM, url: str) -> None:
    llm.script = CALLS
    body = ask(url, tools=[WEATHER], tool_choice="none")
    assert [item["type"] for item in body["output"]] == ["message"]
    assert body["tools"] == [WEATHER]
    assert [turn.role for turn in llm.chats[0].turns] == ["user"]


def test_no_tools_is_no_wish(llm: ScriptedLLM, url: str) -> None:
    llm.script = CALLS
    assert [item["type"] for item in ask(url, tools=[])["output"]] == ["message"]


def test_a_forced_call_has_no_room_for_a_format(llm: ScriptedLLM, url: str) -> None:
    text = {"format": {"type": "json_object"}}
    llm.script = CALLS
    ask(url, tools=[WEATHER, TIME], tool_choice="required", text=text, response_format={"type": "json_object"})
    # The other way round, where calling is free, what looks like a call is the text that was asked for.
    assert [item["type"] for item in ask(url, tools=[WEATHER, TIME], text=text)["output"]] == ["message"]
    forced, free = [chat.sampling.grammar for chat in llm.chats]
    assert forced is not None
    assert forced.param == "tools"
    assert free is not None
    assert (free.source, free.param) == ('{"type":"object"}', "text.format")
    assert [turn.role for turn in llm.chats[1].turns] == ["user"]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tools": {}}, "tools", "invalid_type"),
        ({"tools": [5]}, "tools[0]", "invalid_type"),
        ({"tools": [{"name": "f"}]}, "tools[0].type", "missing_required_parameter"),
        ({"tools": [{"type": "function"}]}, "tools[0].name", "missing_required_parameter"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "invalid_value"),
        ({"tools": [TIME, {**TIME, "parameters": 5}]}, "tools[1].parameters", "invalid_type"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "unsupported_value"),
        ({"tools": [TIME, {"type": "custom", "name": "c"}]}, "tools[1].type", "unsupported_value"),
        ({"tools": [{"type": "mcp"}], "tool_choice": "none"}, "tools[0].type", "unsupported_value"),
        ({"tools": [TIME] * 129}, "tools", "array_above_max_length"),
        ({"tools": [TIME], "tool_choice": 5}, "tool_choice", "invalid_type"),
        ({"tools": [TIME], "tool_choice": "always"}, "tool_choice", "invalid_value"),
        ({"tools": [TIME], "tool_choice": {"type": "function"}}, "tool_choice.name", "missing_required_parameter"),
        ({"tools": [TIME], "tool_choice": NAMED}, "tool_choice", "invalid_value"),
        ({"tools": [TIME], "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "unsupported_value"),
        ({"tools": [TIME], "tool_choice": {"type": "web_search"}}, "tool_choice.type", "invalid_value"),
        ({"tool_choice": NAMED}, "tool_choice", "invalid_value"),
        (
            {"tools": [{**TIME, "parameters": {"type": "array"}}], "tool_choice": "required"},
            "tools[0].parameters",
            "invalid_value",
        ),
    ],
)
def test_refused(llm: ScriptedLLM, url: str, fields: dict[str, Any], param: str, code: str) -> None:
    answer = post(url, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code)
    assert ".function" not in error["message"]
    assert not llm.chats


def test_the_tool_at_fault_is_named() -> None:
    bad = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {UNCOMPILABLE: {}}}}
    with serving(ScriptedLLM()) as url:
        for streamed in (False, True):
            error = post(url, tools=[TIME, bad], tool_choice="required", stream=streamed).json()["error"]
            assert error["param"] == "tools[1].parameters"
            assert error["message"] == "'tools[1].parameters' does not compile"


def test_calls_go_back_as_history(llm: ScriptedLLM, client: openai.OpenAI) -> None:
    tools: list[Any] = [WEATHER, TIME]
    history: list[Any] = [{"role": "user", "content": "Weather?"}]
    llm.script = CALLS
    first = client.responses.create(model="idefics2-8b", input=history, tools=tools, tool_choice="required")
    history += first.output
    for item in first.output:
        assert item.type == "function_call"
        history.append({"type": "function_call_output", "call_id": item.call_id, "output": "4 degrees"})
    client.responses.create(model="idefics2-8b", input=history, tools=tools, tool_choice="none")
    turns = llm.chats[1].turns
    assert [turn.role for turn in turns] == ["user", "assistant", "tool", "tool"]
    assert isinstance(turns[1].parts[0], TextPart)
    assert json.loads(turns[1].parts[0].text) == [
        {"name": "weather", "arguments": {"city": "Oslo"}},
        {"name": "time", "arguments": {}},
    ]
