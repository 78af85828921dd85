"""Items of a responses request → turns: what joins, what is dropped, and what every complaint points at."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.api.chat.messages import MAX_MESSAGES, MAX_PARTS, MAX_TOOL_CALLS, parse_messages
from server.api.responses.input import parse_input
from server.api.schemas import EXAMPLE_IMAGE
from server.errors import ClientError
from server.types import ImageInput, TextPart, Turn


def turn(role: str, *texts: str) -> Turn:
    return Turn(role=role, parts=tuple(TextPart(text) for text in texts))


def call(name: Any = "f", arguments: Any = "{}", **more: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": "call_1", "name": name, "arguments": arguments, **more}


def complaint(raw: object) -> ClientError:
    with pytest.raises(ClientError) as caught:
        parse_input(raw)
    return caught.value


def test_a_text_is_a_user_message() -> None:
    assert parse_input("Hi") == (turn("user", "Hi"),)
    assert parse_input("") == (turn("user", ""),)


def test_easy_messages() -> None:
    assert parse_input(
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "system", "content": [{"type": "input_text", "text": "Very."}]},
            {"type": "message", "role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Ho", "phase": "final_answer"},
        ]
    ) == (turn("system", "Be brief."), turn("system", "Very."), turn("user", "Hi"), turn("assistant", "Ho"))


def test_pictures_and_texts_in_their_order() -> None:
    parts = [
        {"type": "input_text", "text": "This"},
        {"type": "input_image", "image_url": EXAMPLE_IMAGE, "detail": "low"},
        {"type": "input_image", "image_url": "https://example.com/a.png"},
        {"type": "input_text", "text": "and that", "prompt_cache_breakpoint": {"mode": "explicit"}},
    ]
    assert parse_input([{"role": "user", "content": "First"}, {"role": "user", "content": parts}])[1].parts == (
        TextPart("This"),
        ImageInput(url=EXAMPLE_IMAGE, detail="low", param="input[1].content[1].image_url"),
        ImageInput(url="https://example.com/a.png", detail="auto", param="input[1].content[2].image_url"),
        TextPart("and that"),
    )


def test_an_answer_comes_back_as_it_was_sent() -> None:
    content = [{"type": "output_text", "text": "Red.", "annotations": [], "logprobs": []}]
    item = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": content}
    assert parse_input([item]) == (turn("assistant", "Red."),)


def test_a_refusal_is_text() -> None:
    assert parse_input([{"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}]) == (
        turn("assistant", "No."),
    )


def test_reasoning_is_dropped() -> None:
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}]}
    assert parse_input([reasoning, {"role": "user", "content": "Hi"}]) == (turn("user", "Hi"),)
    error = complaint([reasoning])
    assert (error.param, error.code) == ("input", "invalid_value")


@pytest.mark.parametrize("said", ["", "I will look."])
def test_calls_read_as_in_a_chat(said: str) -> None:
    """The same conversation in both endpoints' words gives the same turns."""
    items = [
        {"role": "user", "content": "Weather?"},
        *([{"role": "assistant", "content": said}] if said else []),
        {"type": "reasoning", "summary": []},
        call("weather", '{"city": "Oslo"}', id="fc_1", status="completed"),
        call("time"),
        {"type": "function_call_output", "call_id": "call_1", "output": "4 degrees"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "noon"}]},
        {"role": "assistant", "content": "Cold."},
    ]
    functions = [{"name": "weather", "arguments": '{"city": "Oslo"}'}, {"name": "time", "arguments": "{}"}]
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": said or None, "tool_calls": [{"function": f} for f in functions]},
        {"role": "tool", "content": "4 degrees"},
        {"role": "tool", "content": "noon"},
        {"role": "assistant", "content": "Cold."},
    ]
    turns = parse_input(items)
    assert turns == parse_messages(messages)
    called = turns[1].parts[-1]
    assert isinstance(called, TextPart)
    assert json.loads(called.text) == [
        {"name": "weather", "arguments": {"city": "Oslo"}},
        {"name": "time", "arguments": {}},
    ]


def test_calls_join_what_stands_before_them_only() -> None:
    turns = parse_input([call("a"), {"role": "assistant", "content": "Done."}, call("b"), call("c")])
    assert [item.role for item in turns] == ["assistant", "assistant"]
    assert [len(item.parts) for item in turns] == [1, 2]
    after_user = parse_input([{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}, call("a")])
    assert [item.role for item in after_user] == ["assistant", "user", "assistant"]
    assert len(after_user[2].parts) == 1


def test_two_messages_of_an_assistant_stay_two() -> None:
    item = {"role": "assistant", "content": "x"}
    assert parse_input([item, item]) == (turn("assistant", "x"), turn("assistant", "x"))


def test_an_empty_output_is_an_empty_text() -> None:
    assert parse_input([{"type": "function_call_output", "call_id": "c", "output": ""}]) == (turn("tool", ""),)


IMAGE_PART = {"type": "input_image", "image_url": EXAMPLE_IMAGE}


@pytest.mark.parametrize(
    ("raw", "param", "code"),
    [
        (None, "input", "invalid_type"),
        ({"role": "user", "content": "Hi"}, "input", "invalid_type"),
        ([], "input", "empty_array"),
        (["Hi"], "input[0]", "invalid_type"),
        ([{"role": "user", "content": "Hi"}, 5], "input[1]", "invalid_type"),
        ([{"type": 5}], "input[0].type", "invalid_type"),
        ([{"type": "item_reference", "id": "msg_1"}], "input[0].type", "unsupported_value"),
        ([{"type": "computer_call_output"}], "input[0].type", "unsupported_value"),
        ([{"content": "Hi"}], "input[0].role", "missing_required_parameter"),
        ([{"role": "tool", "content": "Hi"}], "input[0].role", "invalid_value"),
        ([{"role": "User", "content": "Hi"}], "input[0].role", "invalid_value"),
        ([{"role": "user"}], "input[0].content", "missing_required_parameter"),
        ([{"role": "user", "content": {}}], "input[0].content", "invalid_type"),
        ([{"role": "user", "content": []}], "input[0].content", "empty_array"),
        ([{"role": "user", "content": [{"type": "input_file"}]}], "input[0].content[0].type", "unsupported_value"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "input[0].content[0].type", "unsupported_value"),
        (
            [{"role": "user", "content": [{"type": "input_image", "file_id": "file_1"}]}],
            "input[0].content[0].file_id",
            "unsupported_value",
        ),
        (
            [{"role": "user", "content": [{"type": "input_image"}]}],
            "input[0].content[0].image_url",
            "missing_required_parameter",
        ),
        (
            [{"role": "user", "content": [{**IMAGE_PART, "detail": "medium"}]}],
            "input[0].content[0].detail",
            "invalid_value",
        ),
        ([{"role": "system", "content": [IMAGE_PART]}], "input[0].content[0]", "invalid_value"),
        ([call(name=None)], "input[0].name", "missing_required_parameter"),
        ([call(arguments={})], "input[0].arguments", "invalid_type"),
        ([{"type": "function_call_output", "call_id": "c"}], "input[0].output", "missing_required_parameter"),
        ([{"type": "function_call_output", "output": 5}], "input[0].output", "invalid_type"),
        ([{"type": "function_call_output", "output": [IMAGE_PART]}], "input[0].output[0]", "invalid_value"),
        ([{"role": "user", "content": "x"}] * (MAX_MESSAGES + 1), "input", "array_above_max_length"),
        ([call()] * (MAX_TOOL_CALLS + 1), "input", "array_above_max_length"),
        ([{"role": "user", "content": ["x"] * MAX_PARTS}] * 2, "input", "array_above_max_length"),
    ],
)
def test_complaints(raw: Any, param: str, code: str) -> None:
    error = complaint(raw)
    assert (error.param, error.code) == (param, code)


def test_limits_themselves_are_allowed() -> None:
    assert len(parse_input([{"role": "user", "content": "x"}] * MAX_MESSAGES)) == MAX_MESSAGES
    assert len(json.loads(parse_input([call()] * MAX_TOOL_CALLS)[0].parts[0].text)) == MAX_TOOL_CALLS  # type: ignore[union-attr]


def test_complaints_repeat_nothing() -> None:
    secret = "hunter2"
    for raw in (
        [{"type": secret}],
        [{"role": secret, "content": "x"}],
        [{"role": "user", "content": [{"type": secret}]}],
        [{"type": "item_reference", "id": secret}],
    ):
        assert secret not in complaint(raw).message


def test_too_many_parts_are_found_before_all_are_made() -> None:
    """Parts are counted as items are read: the item at fault after them is not reached."""
    many = {"role": "user", "content": ["x"] * MAX_PARTS}
    assert complaint([many, many, {"role": "bot"}]).code == "array_above_max_length"
