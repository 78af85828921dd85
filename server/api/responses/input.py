"""The `input` of a responses request → turns. What an item holds is read as chat reads its messages.

Knows which items there are and how they join into turns; parts, pictures and roles' names are `messages`' business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from server.api.chat.messages import MAX_MESSAGES, MAX_PARTS, MAX_TOOL_CALLS, parse_content, parse_message, string_field
from server.api.errors import invalid_type, invalid_value, missing, too_many
from server.errors import ClientError
from server.types import TextPart, Turn

_ROLES = frozenset({"user", "assistant", "system", "developer"})
# The reasoning of other models, which clients replay; this model never sees it.
_DROPPED_ITEMS = frozenset({"reasoning"})


def parse_input(raw: object) -> tuple[Turn, ...]:
    """A text, or an array of items. Raises ClientError; there is always at least one turn."""
    if isinstance(raw, str):
        return (Turn(role="user", parts=(TextPart(raw),)),)
    if not isinstance(raw, list):
        raise invalid_type("input", "a string or an array of items")
    if not raw:
        raise ClientError("'input' must not be an empty array", param="input", code="empty_array")
    if len(raw) > MAX_MESSAGES:
        raise too_many("input", len(raw), limit=MAX_MESSAGES)
    turns = []
    num_parts = 0
    for turn in _join_calls(_parse_items(raw)):
        num_parts += len(turn.parts)
        if num_parts > MAX_PARTS:
            raise too_many("input", num_parts, limit=MAX_PARTS, what="content parts in all")
        turns.append(turn)
    if not turns:
        raise invalid_value("input", "must have at least one message")
    return tuple(turns)


@dataclass(frozen=True)
class _Call:
    """A call that an assistant made earlier, as a chat message has it."""

    function: dict[str, str]


def _join_calls(items: Iterable[Turn | _Call]) -> Iterator[Turn]:
    """What an assistant says and the calls that it then makes are items of their own here, but one turn of a chat."""
    said: Turn | None = None  # an assistant's, to which calls may be added
    calls: list[_Call] = []
    for item in chain(items, (None,)):
        if isinstance(item, _Call):
            calls.append(item)
            if len(calls) > MAX_TOOL_CALLS:
                raise too_many("input", len(calls), limit=MAX_TOOL_CALLS, what="function calls in a row")
            continue
        if calls:
            message = {"role": "assistant", "tool_calls": [{"function": call.function} for call in calls]}
            called = parse_message(message, "input")
            yield called if said is None else Turn(role="assistant", parts=said.parts + called.parts)
        elif said is not None:
            yield said
        said, calls = None, []
        if item is not None and item.role == "assistant":
            said = item
        elif item is not None:
            yield item


def _parse_items(items: list[object]) -> Iterator[Turn | _Call]:
    for index, item in enumerate(items):
        parsed = _parse_item(item, f"input[{index}]")
        if parsed is not None:
            yield parsed


def _parse_item(item: object, param: str) -> Turn | _Call | None:
    """None: an item that is accepted and leaves nothing in the prompt."""
    if not isinstance(item, dict):
        raise invalid_type(param, "an object")
    kind = "message" if item.get("type") is None else string_field(item, "type", param)
    if kind == "message":
        return _parse_message_item(item, param)
    if kind == "function_call":
        return _Call({key: string_field(item, key, param) for key in ("name", "arguments")})
    if kind == "function_call_output":
        return _parse_call_output(item, param)
    if kind in _DROPPED_ITEMS:
        return None
    if kind == "item_reference":
        message = f"'{param}' refers to a stored item, but none is stored here; send it whole, as with 'store' false"
        raise ClientError(message, param=f"{param}.type", code="unsupported_value")
    raise ClientError(
        f"'{param}.type' is not supported; supported are 'message', 'function_call' and 'function_call_output'",
        param=f"{param}.type",
        code="unsupported_value",
    )


def _parse_message_item(item: dict[str, Any], param: str) -> Turn:
    if string_field(item, "role", param) not in _ROLES:
        raise invalid_value(f"{param}.role", "must be one of 'user', 'assistant', 'system', 'developer'")
    return parse_message(item, param)


def _parse_call_output(item: dict[str, Any], param: str) -> Turn:
    if item.get("output") is None:
        raise missing(f"{param}.output")
    parts = parse_content(item["output"], "tool", f"{param}.output")
    return Turn(role="tool", parts=parts or (TextPart(""),))
