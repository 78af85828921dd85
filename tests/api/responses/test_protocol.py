"""Every field of a responses request: what it does, what comes back of it, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from server.types import GrammarSpec, Truncation
from tests.api.responses.client import PICTURE, ask, post
from tests.api.scripted_llm import ScriptedLLM


def refusal(url: str, **fields: Any) -> tuple[str | None, str]:
    """(param, code) of a 400."""
    answer = post(url, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error["param"], error["code"]


def test_settings_come_back(url: str) -> None:
    schema = {"type": "object", "properties": {"z": {}, "a": {}}}
    text = {
        "format": {"type": "json_schema", "name": "pair", "schema": schema, "strict": True, "description": "Two."},
        "verbosity": "low",
    }
    given: dict[str, Any] = {
        "model": "HuggingFaceM4/idefics2-8b",
        "instructions": "Be brief.",
        "max_output_tokens": 7,
        "max_tool_calls": 3,
        "metadata": {"shop": "12", "": ""},
        "parallel_tool_calls": False,
        "prompt_cache_key": "key",
        "safety_identifier": "hashed",
        "temperature": 0.25,
        "text": text,
        "top_logprobs": 4,
        "top_p": 0.5,
        "user": "somebody",
        "tool_choice": "none",
    }
    body = ask(url, **given)
    assert {name: body[name] for name in given} == given
    assert list(body["text"]["format"]["schema"]["properties"]) == ["z", "a"]


def test_nothing_is_told_of_labels_that_are_no_short_text(url: str) -> None:
    body = ask(url, user={"id": 5}, safety_identifier=["x"], prompt_cache_key="x" * 513)
    assert (body["user"], body["safety_identifier"], body["prompt_cache_key"]) == (None, None, None)
    assert ask(url, user="x" * 512)["user"] == "x" * 512


def test_accepted_and_ignored(llm: ScriptedLLM, url: str) -> None:
    plain = ask(url)
    body = ask(
        url,
        store=False,
        background=False,
        reasoning={"effort": "high", "summary": "auto"},
        service_tier="flex",
        truncation="auto",
        include=["reasoning.encrypted_content", "some.future.value"],
        prompt_cache_retention="24h",
        context_management=[],
        logprobs=False,
        stream=False,
        unknown={"a": 1},
    )
    changing = ("id", "output", "created_at", "completed_at")
    assert {k: v for k, v in body.items() if k not in changing} == {k: v for k, v in plain.items() if k not in changing}
    assert llm.chats[0].sampling == llm.chats[1].sampling


def test_null_is_absent(llm: ScriptedLLM, url: str) -> None:
    names = [
        *("instructions", "max_output_tokens", "temperature", "top_p", "text", "stream", "stream_options", "include"),
        *(
            "tools",
            "tool_choice",
            "parallel_tool_calls",
            "metadata",
            "store",
            "truncation",
            "reasoning",
            "user",
            "seed",
        ),
        *("previous_response_id", "conversation", "prompt", "background", "top_logprobs", "service_tier", "model"),
        *("max_tokens", "messages", "response_format", "functions", "logprobs", "n", "return_token_ids"),
    ]
    assert ask(url, **dict.fromkeys(names))["text"]["format"] == {"type": "text"}
    assert ask(url, text={"format": None, "verbosity": None})["text"]["verbosity"] == "medium"
    ask(url)
    assert llm.chats[0].sampling == llm.chats[1].sampling == llm.chats[2].sampling


def test_sampling_reaches_the_engine(llm: ScriptedLLM, url: str) -> None:
    ask(
        url,
        seed=5,
        top_k=3,
        min_p=0.1,
        ignore_eos=True,
        min_tokens=2,
        max_output_tokens=4,
        stop=["\n"],
        stop_token_ids=[5],
        logit_bias={"9": -1},
        repetition_penalty=1.1,
        priority=-2,
        cache_salt="salt",
        truncate_prompt_tokens=50,
    )
    (chat,) = llm.chats
    sampling = chat.sampling
    assert (sampling.seed, sampling.top_k, sampling.min_p, sampling.ignore_eos) == (5, 3, 0.1, True)
    assert (sampling.min_tokens, sampling.max_tokens, sampling.stop, sampling.stop_token_ids) == (2, 4, ("\n",), (5,))
    assert (sampling.logit_bias, sampling.repetition_penalty) == ({9: -1.0}, 1.1)
    assert (chat.priority, chat.cache_salt, chat.truncation) == (-2, "salt", Truncation(max_tokens=50))


def test_empty_instructions_are_none(llm: ScriptedLLM, url: str) -> None:
    assert ask(url, instructions="")["instructions"] == ""
    assert [turn.role for turn in llm.chats[0].turns] == ["user"]


@pytest.mark.parametrize(
    ("text", "grammar"),
    [
        ({}, None),
        ({"format": {"type": "text"}}, None),
        ({"format": {"type": "text", "schema": {"type": "null"}}}, None),
        ({"format": {"type": "json_object"}}, GrammarSpec("json_schema", '{"type":"object"}', "text.format")),
        (
            {"format": {"type": "json_schema", "name": "n", "schema": {"b": 1, "a": None}, "strict": False}},
            GrammarSpec("json_schema", '{"b":1,"a":null}', "text.format.schema"),
        ),
    ],
)
def test_text_format(llm: ScriptedLLM, url: str, text: dict[str, Any], grammar: GrammarSpec | None) -> None:
    ask(url, text=text)
    assert llm.chats[0].sampling.grammar == grammar


def test_other_ways_to_constrain(llm: ScriptedLLM, url: str) -> None:
    ask(url, structured_outputs={"choice": ["a", "b"]})
    assert llm.chats[0].sampling.grammar == GrammarSpec("choice", '["a","b"]', "structured_outputs.choice")
    both = {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a+"}}
    assert refusal(url, **both) == ("structured_outputs.regex", "invalid_value")


def test_logprobs_only_where_asked_for(llm: ScriptedLLM, url: str) -> None:
    ask(url, top_logprobs=3)
    ask(url, include=["message.output_text.logprobs"])
    assert [chat.sampling.num_logprobs for chat in llm.chats] == [None, 0]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": None}, "input", "missing_required_parameter"),
        ({"input": []}, "input", "empty_array"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "unsupported_value"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"conversation": {"id": "conv_1"}}, "conversation", "unsupported_parameter"),
        ({"conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"background": 0}, "background", "unsupported_parameter"),
        ({"store": True}, "store", "unsupported_value"),
        ({"store": "no"}, "store", "invalid_type"),
        ({"moderation": {"model": "m"}}, "moderation", "unsupported_parameter"),
        ({"messages": []}, "messages", "unsupported_parameter"),
        ({"max_tokens": 5}, "max_tokens", "unsupported_parameter"),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "unsupported_parameter"),
        ({"functions": [{}]}, "functions", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter"),
        ({"continue_final_message": True}, "continue_final_message", "unsupported_parameter"),
        ({"return_token_ids": True}, "return_token_ids", "unsupported_parameter"),
        ({"n": 2}, "n", "unsupported_value"),
        ({"instructions": 5}, "instructions", "invalid_type"),
        ({"instructions": [{"role": "system"}]}, "instructions", "invalid_type"),
        ({"max_output_tokens": 0}, "max_output_tokens", "integer_below_min_value"),
        ({"max_output_tokens": 2.5}, "max_output_tokens", "invalid_type"),
        ({"max_output_tokens": 2, "min_tokens": 3}, "min_tokens", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "decimal_above_max_value"),
        ({"temperature": "0.5"}, "temperature", "invalid_type"),
        ({"top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
        ({"top_logprobs": -1}, "top_logprobs", "integer_below_min_value"),
        ({"include": "message.output_text.logprobs"}, "include", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"truncation": "left"}, "truncation", "invalid_value"),
        ({"text": "json"}, "text", "invalid_type"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "invalid_value"),
        (
            {"text": {"format": {"type": "json_schema", "name": "n"}}},
            "text.format.schema",
            "missing_required_parameter",
        ),
        ({"text": {"format": {"type": "json_schema", "schema": "{}"}}}, "text.format.schema", "invalid_type"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}},
            "text.format.name",
            "invalid_value",
        ),
        (
            {"text": {"format": {"type": "json_schema", "schema": {"x": "y" * 70000}}}},
            "text.format.schema",
            "invalid_value",
        ),
        ({"metadata": []}, "metadata", "invalid_type"),
        ({"metadata": {"a": 1}}, "metadata", "invalid_type"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "array_above_max_length"),
        ({"metadata": {"k" * 65: "x"}}, "metadata", "invalid_value"),
        ({"metadata": {"k": "x" * 513}}, "metadata", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"input": PICTURE, "truncate_prompt_tokens": 50}, "truncate_prompt_tokens", "unsupported_parameter"),
        ({"logit_bias": {"32003": 1}}, "logit_bias", "invalid_value"),
        ({"prompt_logprobs": 1}, "prompt_logprobs", "unsupported_parameter"),
    ],
)
def test_refused(llm: ScriptedLLM, url: str, fields: dict[str, Any], param: str, code: str) -> None:
    assert refusal(url, **fields) == (param, code)
    assert not llm.chats


def test_limits_of_metadata_themselves(url: str) -> None:
    metadata = {f"{i:064d}": "x" * 512 for i in range(16)}
    assert ask(url, metadata=metadata)["metadata"] == metadata


def test_refusals_repeat_nothing(url: str) -> None:
    secret = "hunter2"
    for fields in (
        {"metadata": {secret: 1}},
        {"previous_response_id": secret},
        {"text": {"format": {"type": secret}}},
        {"tool_choice": secret},
        {"truncation": secret},
        {"input": [{"type": secret}]},
    ):
        answer = post(url, **fields)
        assert answer.status_code == 400
        assert secret not in answer.text
