"""How a chat request spells its tools and the choice among them. What they come to is `api/tools.py`'s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from server.api.errors import invalid_type, invalid_value, missing
from server.api.protocol import Body
from server.api.tools import ChoiceMode, FunctionDefinition, ToolPlan, plan_calls
from server.api.unsupported import unsupported_value

TOOL_CHOICE_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "required": ["type", "function"],
            "properties": {
                "type": {"const": "function"},
                "function": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
            },
        },
    ]
}


class ToolDefinition(Body):
    type: Literal["function", "custom"] = Field(description="'custom' is not supported.")
    function: FunctionDefinition | None = None


def plan_tools(tools: Sequence[ToolDefinition], choice: object, *, parallel: bool) -> ToolPlan | None:
    """None: the answer is text, whatever tools there are. Raises ClientError, also for tools that are not used."""
    functions = []
    for index, tool in enumerate(tools):
        if tool.type == "custom":
            raise unsupported_value(f"tools[{index}].type", "only 'function' is")
        if tool.function is None:
            raise missing(f"tools[{index}].function")
        functions.append(tool.function)
    return plan_calls(functions, *read_choice(choice), parallel=parallel, parameters_key="function.parameters")


def read_choice(choice: object) -> tuple[ChoiceMode, str]:
    """The mode, and the name of the function that must be called. Raises ClientError."""
    if choice is None:
        return "auto", ""
    if isinstance(choice, str):
        for mode in ("none", "auto", "required"):
            if choice == mode:
                return mode, ""
        raise invalid_value("tool_choice", "must be 'none', 'auto', 'required' or an object")
    if not isinstance(choice, dict):
        raise invalid_type("tool_choice", "a string or an object")
    kind = choice.get("type")
    if kind is None:
        raise missing("tool_choice.type")
    if kind in ("allowed_tools", "custom"):
        raise unsupported_value("tool_choice", "an object of type 'function' is")
    if kind != "function":
        raise invalid_value("tool_choice.type", "must be 'function'")
    function = choice.get("function")
    if function is None:
        raise missing("tool_choice.function")
    if not isinstance(function, dict):
        raise invalid_type("tool_choice.function", "an object")
    if function.get("name") is None:
        raise missing("tool_choice.function.name")
    if not isinstance(function["name"], str):
        raise invalid_type("tool_choice.function.name", "a string")
    return "named", function["name"]
