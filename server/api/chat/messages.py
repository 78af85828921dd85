"""Messages of a chat request → turns. Written out by hand because the wire form is a union of unions.

Clients spell one thing in many ways (OpenAI's chat and responses parts, Hugging Face's image parts, bare strings);
all of them end as TextPart and ImageInput here, and every complaint carries the path of the field at fault.
Fetches and decodes nothing, and never looks for images or special tokens inside text.
"""

from __future__ import annotations

from typing import Any

import msgspec

from server.api.errors import invalid_type, invalid_value, missing, too_many
from server.errors import ClientError
from server.types import ImageDetail, ImageInput, TextPart, Turn

MAX_MESSAGES = 32_768
MAX_PARTS = 65_536  # over all messages of a request
MAX_TOOL_CALLS = 128  # of one message

# The chat template knows one name for each speaker.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_DETAILS: dict[str, ImageDetail] = {"auto": "auto", "low": "low", "high": "high", "original": "high"}

# Part type → the field that holds its text.
_TEXT_FIELDS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
_IMAGE_TYPES = frozenset({"image_url", "input_image", "image"})
# Clients replay the reasoning of other models in an assistant's turn; this model never sees it.
_DROPPED_TYPES = frozenset({"thinking", "reasoning", "redacted_thinking"})


def parse_messages(raw: object) -> tuple[Turn, ...]:
    """The `messages` of a request. Raises ClientError; an empty or missing content becomes an empty text."""
    if not isinstance(raw, list):
        raise invalid_type("messages", "an array of messages")
    if not raw:
        raise ClientError("'messages' must not be an empty array", param="messages", code="empty_array")
    if len(raw) > MAX_MESSAGES:
        raise too_many("messages", len(raw), limit=MAX_MESSAGES)
    turns = []
    num_parts = 0
    for index, message in enumerate(raw):
        turn = parse_message(message, f"messages[{index}]")
        num_parts += len(turn.parts)
        if num_parts > MAX_PARTS:
            raise too_many("messages", num_parts, limit=MAX_PARTS, what="content parts in all")
        turns.append(turn)
    return tuple(turns)


def parse_message(message: object, param: str) -> Turn:
    """One message; `param` is its path, for complaints."""
    if not isinstance(message, dict):
        raise invalid_type(param, "an object")
    given = string_field(message, "role", param)
    role = _ROLES.get(given)
    if role is None:
        raise invalid_value(f"{param}.role", "must be one of 'system', 'developer', 'user', 'assistant', 'tool'")
    parts = parse_content(message.get("content"), role, f"{param}.content")
    if role == "assistant" and message.get("tool_calls") is not None:
        parts += _flatten_tool_calls(message["tool_calls"], f"{param}.tool_calls")
    return Turn(role=role, parts=parts or (TextPart(""),))


def parse_content(content: object, role: str, param: str) -> tuple[TextPart | ImageInput, ...]:
    """A message's content, of a turn whose role is one of the template's."""
    if isinstance(content, str):
        return (TextPart(content),)
    if content is None:
        # An assistant's turn that only called tools has none, and clients replay it so.
        if role == "assistant":
            return ()
        raise missing(param)
    if not isinstance(content, list):
        raise invalid_type(param, "a string or an array of content parts")
    if not content:
        raise ClientError(f"'{param}' must not be an empty array", param=param, code="empty_array")
    if len(content) > MAX_PARTS:
        raise too_many(param, len(content), limit=MAX_PARTS)
    parts = (_parse_part(part, role, f"{param}[{index}]") for index, part in enumerate(content))
    return tuple(part for part in parts if part is not None)


def _parse_part(part: object, role: str, param: str) -> TextPart | ImageInput | None:
    """None: a part that is accepted and leaves nothing in the prompt."""
    if isinstance(part, str):
        return TextPart(part)
    if not isinstance(part, dict):
        raise invalid_type(param, "an object")
    kind = _part_type(part, param)
    if kind in _TEXT_FIELDS:
        text = part.get(_TEXT_FIELDS[kind])
        if text is None:
            return None
        if not isinstance(text, str):
            raise invalid_type(f"{param}.{_TEXT_FIELDS[kind]}", "a string")
        return TextPart(text)
    if kind in _IMAGE_TYPES:
        if role != "user":
            raise invalid_value(param, "is an image, which only messages with role 'user' may have")
        return _parse_image(part, kind, param)
    if kind in _DROPPED_TYPES:
        return None
    raise ClientError(
        f"'{param}.type' is not supported; supported are 'text' and 'image_url'",
        param=f"{param}.type",
        code="unsupported_value",
    )


def _part_type(part: dict[str, Any], param: str) -> str:
    """JavaScript clients leave `type` out where the key of the payload already says it."""
    if part.get("type") is None:
        for kind in ("text", "image_url"):
            if part.get(kind) is not None:
                return kind
    return string_field(part, "type", param)


def _parse_image(part: dict[str, Any], kind: str, param: str) -> ImageInput:
    if kind == "input_image" and part.get("image_url") is None and part.get("file_id") is not None:
        raise ClientError(
            f"'{param}.file_id' is not supported; send the picture in 'image_url'",
            param=f"{param}.file_id",
            code="unsupported_value",
        )
    key = "image_url"
    if kind == "image":
        key = "url" if part.get("image") is None and part.get("url") is not None else "image"
    value = part.get(key)
    if value is None:
        raise missing(f"{param}.{key}")
    if isinstance(value, str):
        return ImageInput(url=value, detail=_parse_detail(part, param), param=f"{param}.{key}")
    if kind == "image" or not isinstance(value, dict):
        raise invalid_type(f"{param}.{key}", "a string" if kind == "image" else "an object or a string")
    url = string_field(value, "url", f"{param}.{key}")
    holder = (value, f"{param}.{key}") if value.get("detail") is not None else (part, param)
    return ImageInput(url=url, detail=_parse_detail(*holder), param=f"{param}.{key}.url")


def _parse_detail(holder: dict[str, Any], param: str) -> ImageDetail:
    detail = holder.get("detail")
    if detail is None:
        return "auto"
    if not isinstance(detail, str):
        raise invalid_type(f"{param}.detail", "a string")
    if detail not in _DETAILS:
        raise invalid_value(f"{param}.detail", "must be one of 'auto', 'low', 'high', 'original'")
    return _DETAILS[detail]


def _flatten_tool_calls(calls: object, param: str) -> tuple[TextPart, ...]:
    """Calls that an assistant made earlier, as one text: the model has no form of its own for them.

    It is the form in which this server asks for calls, so that what was answered reads like what is to be answered.
    """
    if not isinstance(calls, list):
        raise invalid_type(param, "an array")
    if len(calls) > MAX_TOOL_CALLS:
        raise too_many(param, len(calls), limit=MAX_TOOL_CALLS)
    entries = []
    for index, call in enumerate(calls):
        path = f"{param}[{index}]"
        if not isinstance(call, dict):
            raise invalid_type(path, "an object")
        function = call.get("function")
        if not isinstance(function, dict):
            raise missing(f"{path}.function") if function is None else invalid_type(f"{path}.function", "an object")
        name = string_field(function, "name", f"{path}.function")
        arguments = "" if function.get("arguments") is None else string_field(function, "arguments", f"{path}.function")
        entries.append({"name": name, "arguments": _parsed(arguments)})
    return (TextPart(msgspec.json.encode(entries).decode()),) if entries else ()


def _parsed(arguments: str) -> object:
    """Arguments are JSON in a string; where a model has written something else, they stay a string."""
    try:
        msgspec.json.decode(arguments, type=msgspec.Raw)  # checked, and nothing made of it
    except (msgspec.DecodeError, RecursionError):
        return arguments
    return msgspec.Raw(arguments.encode())


def string_field(holder: dict[str, Any], key: str, param: str) -> str:
    """A string that must be there; `param` is the path of its holder."""
    value = holder.get(key)
    if value is None:
        raise missing(f"{param}.{key}")
    if not isinstance(value, str):
        raise invalid_type(f"{param}.{key}", "a string")
    return value
