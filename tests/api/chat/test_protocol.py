"""Request parsing, field by field: what is taken, what is refused, and with which code and parameter."""

from __future__ import annotations

import logging
import math
import re
from typing import Any

import pytest

from server.api.chat.protocol import ChatCompletionRequest, parse_chat_request
from server.api.chat.routes import to_chat_input
from server.api.errors import MAX_MESSAGE_CHARS
from server.api.protocol import Body
from server.errors import ClientError
from server.types import ChatInput, ImageInput, SamplingParams, TextPart, Truncation, Turn
from tests.api.chat.client import HELLO

VOCAB = 32003
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def to_input(**fields: Any) -> ChatInput:
    return to_chat_input(parse_chat_request({"messages": HELLO, **fields}), request_id="r", vocab_size=VOCAB)


def sampling(**fields: Any) -> SamplingParams:
    return to_input(**fields).sampling


def test_defaults() -> None:
    assert sampling() == SamplingParams()
    assert (to_input().priority, to_input().cache_salt, to_input().request_id) == (0, "", "r")


@pytest.mark.parametrize("field", [*ChatCompletionRequest.model_fields, "guided_json", "chat_template", "anything"])
def test_null_is_absent(field: str) -> None:
    """Also in a field that is refused with any other value."""
    body = {"messages": HELLO, field: None}
    if field == "messages":
        with pytest.raises(ClientError) as caught:
            parse_chat_request(body)
        assert caught.value.code == "missing_required_parameter"
    else:
        assert parse_chat_request(body) == parse_chat_request({"messages": HELLO})


def test_null_is_absent_further_in() -> None:
    request = parse_chat_request({"messages": HELLO, "stream": True, "stream_options": {"include_usage": None}})
    assert request.stream_options.include_usage is False


@pytest.mark.parametrize(
    "fields",
    [
        {"made_up": {"a": [1]}, "user": {"id": 5}, "metadata": {"a": {"b": 1}}, "store": True},
        {"safety_identifier": 1, "prompt_cache_key": "k", "reasoning_effort": "high", "verbosity": "low"},
        {"parallel_tool_calls": False, "prediction": {"type": "content", "content": "x"}, "documents": [{"text": "x"}]},
        {"chat_template_kwargs": {"enable_thinking": False}, "guided_decoding_backend": "x", "truncation_side": "left"},
        {"options": {}, "keep_alive": "5m", "num_ctx": 1, "extra_body": {}, "length_penalty": 2, "do_sample": True},
        # What benchmarks and front ends send with values that ask for nothing.
        {"n": 1, "logprobs": False, "top_logprobs": 0, "response_format": {"type": "text"}, "echo": False},
        {"best_of": 1, "use_beam_search": False, "modalities": ["text"], "add_generation_prompt": True},
        {"continue_final_message": False, "mm_processor_kwargs": {}, "typical_p": 1.0, "watermark": False},
        {"mm_processor_kwargs": {"do_image_splitting": None}, "early_stopping": False, "add_special_tokens": True},
        {"return_token_ids": True, "request_id": {"no": "string"}, "truncation_side": "right", "top_n_tokens": 3},
        {"structured_outputs": None, "guided_json": None, "guided_choice": None, "grammar": None, "tools": None},
        {"session_id": "s", "rid": "r", "stream_interval": 4, "tool_prompt": "x", "think": True, "mirostat": 2},
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": True},
        {"function_call": "auto", "functions": []},
        {"stream_options": {}},
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": True}},
    ],
)
def test_accepted_and_ignored(fields: dict[str, Any]) -> None:
    assert sampling(**fields) == SamplingParams()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 2}, {"temperature": 2.0}),
        ({"temperature": 1e-300}, {"temperature": 0.01}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"top_p": 0}, {"top_p": 1.0, "top_k": 1}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 0}, {"top_k": 0}),
        ({"top_k": 40}, {"top_k": 40}),
        ({"min_p": 0}, {"min_p": 0.0}),
        ({"min_p": 1}, {"min_p": 1.0}),
        ({"max_tokens": 5}, {"max_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 7}, {"max_tokens": 7}),
        ({"max_tokens": 10**9}, {"max_tokens": 10**9}),  # clamped where the context is known
        ({"min_tokens": 3}, {"min_tokens": 3}),
        ({"min_new_tokens": 3}, {"min_tokens": 3}),
        ({"min_tokens": 5, "max_tokens": 5}, {"min_tokens": 5, "max_tokens": 5}),
        ({"ignore_eos": True, "max_tokens": 64}, {"ignore_eos": True, "max_tokens": 64}),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"presence_penalty": -2, "frequency_penalty": 2}, {"presence_penalty": -2.0, "frequency_penalty": 2.0}),
        ({"seed": 7}, {"seed": 7}),
        ({"seed": -1}, {"seed": None}),
        ({"seed": 2**63 - 1}, {"seed": 2**63 - 1}),
        ({"seed": -(2**63)}, {"seed": -(2**63)}),
        ({"stop": "\n"}, {"stop": ("\n",)}),
        ({"stop": ["a", "b", "c", "d"]}, {"stop": ("a", "b", "c", "d")}),
        ({"stop": []}, {"stop": ()}),
        ({"stop_token_ids": [32002, 0]}, {"stop_token_ids": (32002, 0)}),
        ({"logit_bias": {"5": 100, "32002": -0.5}}, {"logit_bias": {5: 100.0, 32002: -0.5}}),
        ({"include_stop_str_in_output": True}, {"include_stop_str_in_output": True}),
        ({"skip_special_tokens": False}, {"skip_special_tokens": False}),
        ({"logprobs": True}, {"num_logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 20}, {"num_logprobs": 20}),
        ({"logprobs": False, "top_logprobs": 0}, {"num_logprobs": None}),
        ({"n": 3, "best_of": 3}, {}),
    ],
)
def test_sampling(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sampling(**fields) == SamplingParams(**expected)


def test_priority_and_salt() -> None:
    chat = to_input(priority=-5, cache_salt="tenant-1")
    assert (chat.priority, chat.cache_salt) == (-5, "tenant-1")


def test_choices() -> None:
    assert (to_input().n, to_input(n=16).n) == (1, 16)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"truncation_side": "right"}, None),
        ({"truncate_prompt_tokens": -1}, Truncation(None, "left")),
        ({"truncate_prompt_tokens": 5, "truncation_side": "right"}, Truncation(5, "right")),
    ],
)
def test_truncation(fields: dict[str, Any], expected: Truncation | None) -> None:
    assert to_input(**fields).truncation == expected


@pytest.mark.parametrize(
    ("fields", "opens", "continues"),
    [
        ({}, True, False),
        ({"add_generation_prompt": False}, False, False),
        ({"continue_final_message": True}, False, True),
        ({"continue_final_message": True, "add_generation_prompt": False}, False, True),
        ({"continue_final_message": False, "add_generation_prompt": True}, True, False),
    ],
)
def test_how_the_prompt_ends(fields: dict[str, Any], opens: bool, continues: bool) -> None:
    chat = to_input(messages=[*HELLO, {"role": "assistant", "content": "Once"}], **fields)
    assert (chat.add_generation_prompt, chat.continue_final_message) == (opens, continues)


@pytest.mark.parametrize(("split", "auto"), [(True, "high"), (False, "low"), (None, "auto")])
def test_image_splitting_of_a_request(split: bool | None, auto: str) -> None:
    """It is what 'auto' means; a picture that says for itself is left alone."""
    parts = [{"type": "text", "text": "x"}] + [
        {"type": "image_url", "image_url": {"url": "u", "detail": detail}} for detail in ("auto", "low", "high")
    ]
    chat = to_input(
        messages=[{"role": "user", "content": parts}, *HELLO], mm_processor_kwargs={"do_image_splitting": split}
    )
    text, *images = chat.turns[0].parts
    assert text == TextPart("x")
    assert [image.detail for image in images if isinstance(image, ImageInput)] == [auto, "low", "high"]
    assert chat.turns[1] == Turn(role="user", parts=(TextPart("Hi"),))


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("my.id_7-X", True),
        ("x" * 128, True),
        *((bad, False) for bad in ("x" * 129, "", "a b", "a/b", "a\n", "é", 5, ["x"], None)),
    ],
)
def test_answer_id(given: object, kept: bool) -> None:
    request = parse_chat_request({"messages": HELLO, "request_id": given})
    if kept:
        assert request.answer_id("chatcmpl") == f"chatcmpl-{given}"
    else:
        assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", request.answer_id("chatcmpl"))
        assert request.answer_id("chatcmpl") != request.answer_id("chatcmpl")


TYPE, LOW, HIGH, VALUE = "invalid_type", "below_min_value", "above_max_value", "invalid_value"


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("temperature", "0.5", TYPE),
        ("temperature", True, TYPE),
        ("temperature", -0.1, "decimal_" + LOW),
        ("temperature", 2.1, "decimal_" + HIGH),
        ("temperature", math.inf, TYPE),
        ("temperature", math.nan, TYPE),
        ("temperature", [], TYPE),
        ("top_p", -0.1, "decimal_" + LOW),
        ("top_p", 1.1, "decimal_" + HIGH),
        ("top_k", -2, "integer_" + LOW),
        ("top_k", 2**31, "integer_" + HIGH),
        ("top_k", 1.5, TYPE),
        ("min_p", 1.5, "decimal_" + HIGH),
        ("min_p", -0.1, "decimal_" + LOW),
        ("repetition_penalty", 0, "decimal_" + LOW),
        ("repetition_penalty", 101, "decimal_" + HIGH),
        ("presence_penalty", 2.1, "decimal_" + HIGH),
        ("frequency_penalty", -2.1, "decimal_" + LOW),
        ("max_tokens", 0, "integer_" + LOW),
        ("max_tokens", -1, "integer_" + LOW),
        ("max_tokens", 2**31, "integer_" + HIGH),
        ("max_tokens", True, TYPE),
        ("max_tokens", "5", TYPE),
        ("max_tokens", 5.0, TYPE),
        ("max_completion_tokens", 0, "integer_" + LOW),
        ("min_tokens", -1, "integer_" + LOW),
        ("seed", 2**63, "integer_" + HIGH),
        ("seed", -(2**63) - 1, "integer_" + LOW),
        ("seed", 10**4000, "integer_" + HIGH),
        ("seed", "1", TYPE),
        ("priority", 2**31, "integer_" + HIGH),
        ("priority", -(2**31) - 1, "integer_" + LOW),
        ("n", 0, "integer_" + LOW),
        ("n", 17, "integer_" + HIGH),
        ("stream", "true", TYPE),
        ("stream", 1, TYPE),
        ("ignore_eos", 1, TYPE),
        ("model", 5, TYPE),
        ("model", "x" * 1025, "string_above_max_length"),
        ("stop", 5, TYPE),
        ("stop", "", VALUE),
        ("stop", ["a"] * 5, "array_above_max_length"),
        ("stop", "x" * 1025, "string_above_max_length"),
        ("logit_bias", [], TYPE),
        ("logit_bias", {"abc": 1}, VALUE),
        ("logit_bias", {"-1": 1}, VALUE),
        ("logit_bias", {"٣": 1}, VALUE),
        ("logit_bias", {"99999999": 1}, VALUE),
        ("logit_bias", {"32003": 1}, VALUE),
        ("logit_bias", {"5": 101}, VALUE),
        ("logit_bias", {"5": math.inf}, VALUE),
        ("logit_bias", {"5": "1"}, TYPE),
        ("logit_bias", {"5": True}, TYPE),
        ("logit_bias", {str(i): 0 for i in range(301)}, "array_above_max_length"),
        ("stop_token_ids", [0] * 129, "array_above_max_length"),
        ("stop_token_ids", 5, TYPE),
        ("cache_salt", "", "string_below_min_length"),
        ("cache_salt", "x" * 129, "string_above_max_length"),
        ("cache_salt", "a@b", VALUE),
        ("cache_salt", "a/b", VALUE),
        ("cache_salt", "a\\b", VALUE),
        ("cache_salt", "a\0b", VALUE),
        ("stream_options", {"include_usage": True}, VALUE),  # without stream
        ("stream_options", [], TYPE),
        ("messages", [], "empty_array"),
        ("messages", "Hi", TYPE),
        ("logprobs", 5, TYPE),
        ("top_logprobs", 5, VALUE),  # without logprobs
        ("top_logprobs", 21, "integer_" + HIGH),
        ("top_logprobs", -1, "integer_" + LOW),
        ("response_format", "json", TYPE),
        ("tools", [], "empty_array"),
        ("tools", [TOOL] * 129, "array_above_max_length"),
        ("tools", {}, TYPE),
        ("tool_choice", "required", VALUE),  # without tools
        ("tool_choice", {"type": "function", "function": {"name": "f"}}, VALUE),
        ("tool_choice", {"type": "custom", "custom": {"name": "f"}}, "unsupported_value"),
        ("tool_choice", {"type": "allowed_tools"}, "unsupported_value"),
        ("tool_choice", "any", VALUE),
        ("tool_choice", 5, TYPE),
        ("modalities", ["text", "audio"], "unsupported_value"),
        ("best_of", 2, "unsupported_value"),
        ("best_of", True, TYPE),
        ("best_of", 0, "integer_" + LOW),
        ("truncate_prompt_tokens", -2, "integer_" + LOW),
        ("truncate_prompt_tokens", 0, VALUE),
        ("truncate_prompt_tokens", "5", TYPE),
        ("truncation_side", "middle", VALUE),
        ("return_token_ids", 1, TYPE),
        ("parallel_tool_calls", "no", TYPE),
        ("continue_final_message", True, VALUE),  # the last message is the user's
        ("continue_final_message", 1, TYPE),
        ("add_generation_prompt", 0, TYPE),
        ("mm_processor_kwargs", [], TYPE),
        ("mm_processor_kwargs", {"do_image_splitting": True, "size": None}, "unsupported_parameter"),
        ("echo", True, "unsupported_value"),
        ("typical_p", 0.9, "unsupported_value"),
        *[
            (name, value, "unsupported_parameter")
            for name, value in {
                "ebnf": "a",
                "prompt_logprobs": 0,
                "chat_template": "{{ 1 }}",
                "mm_processor_kwargs": {"size": {"longest_edge": 9}},
                "early_stopping": True,
                "return_prompt_text": True,
                "return_tokens_as_token_ids": True,
                "return_hidden_states": True,
                "logprob_token_ids": [1],
                "stop_regex": "a",
                "custom_logit_processor": "x",
                "media_io_kwargs": {"image": {}},
                "web_search_options": {},
                "moderation": {},
                "bad_words": ["x"],
                "allowed_token_ids": [1],
                "use_beam_search": True,
                "lora_path": "/x",
                "function_call": {"name": "f"},
                "watermark": True,
            }.items()
        ],
    ],
)
def test_refused(field: str, value: Any, code: str) -> None:
    with pytest.raises(ClientError) as caught:
        to_input(**{field: value})
    error = caught.value
    assert (error.param, error.code, error.status, error.type) == (field, code, 400, "invalid_request_error")
    assert f"'{field}'" in error.message
    assert len(error.message) < MAX_MESSAGE_CHARS


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"stop": ["a", ""]}, "stop[1]", VALUE),
        ({"stop": ["a", 5]}, "stop[1]", TYPE),
        ({"stop_token_ids": [5, "6"]}, "stop_token_ids[1]", TYPE),
        ({"stop_token_ids": [5, -6]}, "stop_token_ids[1]", "integer_below_min_value"),
        ({"stop_token_ids": [5, 32003]}, "stop_token_ids[1]", VALUE),
        ({"stream": True, "stream_options": {"include_usage": "yes"}}, "stream_options.include_usage", TYPE),
        ({"response_format": {"type": "xml"}}, "response_format.type", VALUE),
        ({"response_format": {}}, "response_format.type", "missing_required_parameter"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type", "unsupported_value"),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
        (
            {"tools": [TOOL, {"type": "function", "function": {}}]},
            "tools[1].function.name",
            "missing_required_parameter",
        ),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens", VALUE),
        ({"min_tokens": 6, "max_completion_tokens": 5, "max_tokens": 9}, "min_tokens", VALUE),
        ({"mm_processor_kwargs": {"do_image_splitting": 1}}, "mm_processor_kwargs.do_image_splitting", TYPE),
        ({"tools": [TOOL], "tool_choice": {"function": {}}}, "tool_choice.type", "missing_required_parameter"),
        ({"tools": [TOOL], "tool_choice": {"type": "x"}}, "tool_choice.type", VALUE),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice.function", "missing_required_parameter"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": 5}}, "tool_choice.function", TYPE),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {}}},
            "tool_choice.function.name",
            "missing_required_parameter",
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": 5}}},
            "tool_choice.function.name",
            TYPE,
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", VALUE),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", VALUE),
        (
            {"tools": [{"type": "function", "function": {"name": "x" * 65}}]},
            "tools[0].function.name",
            "string_above_max_length",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
            TYPE,
        ),
    ],
)
def test_refused_further_in(fields: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(ClientError) as caught:
        to_input(**fields)
    assert (caught.value.param, caught.value.code) == (param, code)


CONTINUE = {"continue_final_message": True}
PICTURE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}]}


@pytest.mark.parametrize(
    ("last", "fields", "param"),
    [
        ({"role": "assistant", "content": "x"}, {"add_generation_prompt": True, **CONTINUE}, "continue_final_message"),
        ({"role": "user", "content": "x"}, CONTINUE, "continue_final_message"),
        ({"role": "tool", "content": "x"}, CONTINUE, "continue_final_message"),
        ({"role": "assistant", "content": ""}, CONTINUE, "continue_final_message"),
        ({"role": "assistant"}, CONTINUE, "continue_final_message"),
        (PICTURE, CONTINUE, "continue_final_message"),
        (PICTURE, {"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        (PICTURE, {"truncate_prompt_tokens": -1}, "truncate_prompt_tokens"),
    ],
)
def test_messages_that_do_not_go_with_a_field(last: Any, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ClientError) as caught:
        to_input(messages=[*HELLO, last], **fields)
    code = "unsupported_parameter" if param == "truncate_prompt_tokens" else VALUE
    assert (caught.value.param, caught.value.code) == (param, code)


def test_messages_missing() -> None:
    with pytest.raises(ClientError) as caught:
        parse_chat_request({"model": "x"})
    assert (caught.value.param, caught.value.code) == ("messages", "missing_required_parameter")


def test_complaints_state_limit_and_value_but_never_text() -> None:
    with pytest.raises(ClientError, match=r"^'temperature' must be at most 2\.0, not 2\.1$"):
        to_input(temperature=2.1)
    with pytest.raises(ClientError, match=r"^'seed' must be at most 9223372036854775807, not 1000"):
        to_input(seed=10**4000)
    for field, value in [("stop", ["sEcReT"] * 5), ("tool_choice", "sEcReT"), ("logit_bias", {"sEcReT": 1})]:
        with pytest.raises(ClientError) as caught:
            to_input(**{field: value})
        assert "sEcReT" not in caught.value.message


def test_every_number_is_bounded_on_both_sides() -> None:
    """Whatever is added later, too."""
    schema = ChatCompletionRequest.model_json_schema()
    seen = 0
    for name, field in schema["properties"].items():
        for kind in field.get("anyOf", [field, field.get("items", {})]):
            if kind.get("type") in ("integer", "number"):
                seen += 1
                assert {"minimum", "maximum"} <= kind.keys(), name
    assert seen >= 15


def test_bodies_are_strict_and_lenient_where_they_should_be() -> None:
    assert Body.model_config["strict"] is True
    assert Body.model_config["extra"] == "ignore"


def test_a_mistaken_name_is_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert sampling(repeat_penalty=1.3) == SamplingParams()
    assert "repetition_penalty" in caplog.text
