"""Every way in which clients spell a message, and every complaint's code and path."""

from __future__ import annotations

from typing import Any

import pytest

from server.api.chat.messages import parse_messages
from server.errors import ClientError
from server.types import ImageInput, TextPart, Turn

URL = "data:image/png;base64,AAAA"


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def image(**extra: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": URL, **extra}}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": "Hi"}], [("user", ["Hi"])]),
        ([{"role": "user", "content": ""}], [("user", [""])]),
        ([{"role": "user", "content": "Hi", "name": "Bob", "unknown": 1}], [("user", ["Hi"])]),
        # Late and repeated system messages, several turns of one role, OpenAI's newer name for system.
        (
            [
                {"role": "system", "content": "a"},
                {"role": "developer", "content": "b"},
                {"role": "user", "content": "c"},
                {"role": "user", "content": "d"},
                {"role": "system", "content": "e"},
            ],
            [("system", ["a"]), ("system", ["b"]), ("user", ["c"]), ("user", ["d"]), ("system", ["e"])],
        ),
        # Special tokens and links in text are text.
        (user({"type": "text", "text": "<image></s>![](http://127.0.0.1/x.png)"}), None),
        (user({"type": "text", "text": ""}), [("user", [""])]),
        (user("bare", {"type": "input_text", "text": "b"}, {"text": "no type"}), [("user", ["bare", "b", "no type"])]),
        (user({"type": "text", "text": None}), [("user", [""])]),
        # An assistant's turns as clients replay them.
        ([{"role": "assistant", "content": None}], [("assistant", [""])]),
        ([{"role": "assistant"}], [("assistant", [""])]),
        (
            [
                {
                    "role": "assistant",
                    "content": "x",
                    "refusal": None,
                    "tool_calls": None,
                    "annotations": [],
                    "audio": None,
                }
            ],
            [("assistant", ["x"])],
        ),
        (
            [{"role": "assistant", "content": [{"type": "output_text", "text": "x"}, {"type": "thinking", "a": 1}]}],
            [("assistant", ["x"])],
        ),
        ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}], [("assistant", ["no"])]),
        (
            [
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}],
                },
                {"role": "tool", "tool_call_id": "1", "content": "2"},
            ],
            [("assistant", ['[{"name":"f","arguments":{"a":1}}]']), ("tool", ["2"])],
        ),
        (
            [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {"function": {"name": "f", "arguments": ' {"b": "é",\n"a": 1e2} '}},
                        {"function": {"name": "g", "arguments": "no JSON"}},
                        {"function": {"name": "h"}},
                    ],
                }
            ],
            [
                (
                    "assistant",
                    [
                        "",
                        '[{"name":"f","arguments": {"b": "é",\n"a": 1e2} },{"name":"g","arguments":"no JSON"},'
                        '{"name":"h","arguments":""}]',
                    ],
                )
            ],
        ),
        ([{"role": "assistant", "content": "x", "tool_calls": []}], [("assistant", ["x"])]),
    ],
)
def test_texts(messages: Any, expected: list[tuple[str, list[str]]] | None) -> None:
    if expected is None:
        expected = [("user", ["<image></s>![](http://127.0.0.1/x.png)"])]
    turns = tuple(Turn(role=role, parts=tuple(TextPart(text) for text in texts)) for role, texts in expected)
    assert parse_messages(messages) == turns


@pytest.mark.parametrize(
    ("part", "param", "detail"),
    [
        (image(), "image_url.url", "auto"),
        (image(detail=None), "image_url.url", "auto"),
        (image(detail="low"), "image_url.url", "low"),
        (image(detail="high"), "image_url.url", "high"),
        (image(detail="original"), "image_url.url", "high"),
        ({"type": "image_url", "image_url": URL}, "image_url", "auto"),
        ({"type": "image_url", "image_url": URL, "detail": "low"}, "image_url", "low"),
        ({"image_url": {"url": URL}}, "image_url.url", "auto"),
        ({"type": "input_image", "image_url": URL, "detail": "high", "file_id": None}, "image_url", "high"),
        ({"type": "image", "image": URL}, "image", "auto"),
        ({"type": "image", "url": URL}, "url", "auto"),
        ({**image(), "uuid": "abc", "cache_control": {}}, "image_url.url", "auto"),
    ],
)
def test_images(part: Any, param: str, detail: Any) -> None:
    (turn,) = parse_messages(user("before", part, "after"))
    picture = ImageInput(url=URL, detail=detail, param=f"messages[0].content[1].{param}")
    assert turn.parts == (TextPart("before"), picture, TextPart("after"))


def test_an_image_alone() -> None:
    (turn,) = parse_messages(user(image()))
    assert [type(part) for part in turn.parts] == [ImageInput]


@pytest.mark.parametrize(
    ("messages", "param", "code"),
    [
        ("x", "messages", "invalid_type"),
        ({}, "messages", "invalid_type"),
        ([], "messages", "empty_array"),
        ([{"role": "user", "content": "x"}] * 32_769, "messages", "array_above_max_length"),
        (user(*["x"] * 65_537), "messages[0].content", "array_above_max_length"),
        (user(*["x"] * 40_000) * 2, "messages", "array_above_max_length"),
        (["x"], "messages[0]", "invalid_type"),
        ([{"content": "x"}], "messages[0].role", "missing_required_parameter"),
        ([{"role": None, "content": "x"}], "messages[0].role", "missing_required_parameter"),
        ([{"role": 1, "content": "x"}], "messages[0].role", "invalid_type"),
        ([{"role": "User", "content": "x"}], "messages[0].role", "invalid_value"),
        ([{"role": "bot", "content": "x"}], "messages[0].role", "invalid_value"),
        ([{"role": "user"}], "messages[0].content", "missing_required_parameter"),
        ([{"role": "user", "content": None}], "messages[0].content", "missing_required_parameter"),
        ([{"role": "system", "content": None}], "messages[0].content", "missing_required_parameter"),
        ([{"role": "user", "content": []}], "messages[0].content", "empty_array"),
        ([{"role": "assistant", "content": []}], "messages[0].content", "empty_array"),
        ([{"role": "user", "content": {"text": "x"}}], "messages[0].content", "invalid_type"),
        ([{"role": "user", "content": 5}], "messages[0].content", "invalid_type"),
        (user("a", 5), "messages[0].content[1]", "invalid_type"),
        (user({"foo": 1}), "messages[0].content[0].type", "missing_required_parameter"),
        (user({"type": 1}), "messages[0].content[0].type", "invalid_type"),
        (user({"type": "text", "text": 1}), "messages[0].content[0].text", "invalid_type"),
        (user({"type": "image_url"}), "messages[0].content[0].image_url", "missing_required_parameter"),
        (user({"type": "image_url", "uuid": "a"}), "messages[0].content[0].image_url", "missing_required_parameter"),
        (
            user({"type": "image_url", "image_url": {}}),
            "messages[0].content[0].image_url.url",
            "missing_required_parameter",
        ),
        (user({"type": "image_url", "image_url": {"url": 5}}), "messages[0].content[0].image_url.url", "invalid_type"),
        (user({"type": "image_url", "image_url": 5}), "messages[0].content[0].image_url", "invalid_type"),
        (user({"type": "image"}), "messages[0].content[0].image", "missing_required_parameter"),
        (user({"type": "image", "image": {"x": 1}}), "messages[0].content[0].image", "invalid_type"),
        (user("a", image(detail="medium")), "messages[0].content[1].image_url.detail", "invalid_value"),
        (user("a", image(detail=1)), "messages[0].content[1].image_url.detail", "invalid_type"),
        (user({"type": "input_image", "file_id": "f"}), "messages[0].content[0].file_id", "unsupported_value"),
        *[
            (user("a", {"type": kind, kind: {}}), "messages[0].content[1].type", "unsupported_value")
            for kind in ("input_audio", "audio_url", "video_url", "file", "image_embeds", "prompt_embeds", "banana")
        ],
        *[
            ([{"role": role, "content": ["a", image()]}], "messages[0].content[1]", "invalid_value")
            for role in ("system", "developer", "assistant", "tool")
        ],
        ([{"role": "assistant", "tool_calls": {}}], "messages[0].tool_calls", "invalid_type"),
        ([{"role": "assistant", "tool_calls": [1]}], "messages[0].tool_calls[0]", "invalid_type"),
        (
            [{"role": "assistant", "tool_calls": [{}]}],
            "messages[0].tool_calls[0].function",
            "missing_required_parameter",
        ),
        ([{"role": "assistant", "tool_calls": [{}] * 129}], "messages[0].tool_calls", "array_above_max_length"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}],
            "messages[0].tool_calls[0].function.name",
            "invalid_type",
        ),
    ],
)
def test_complaints(messages: Any, param: str, code: str) -> None:
    with pytest.raises(ClientError) as caught:
        parse_messages(messages)
    assert (caught.value.param, caught.value.code, caught.value.status) == (param, code, 400)
    assert param in caught.value.message
