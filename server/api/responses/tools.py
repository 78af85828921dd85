"""A responses request's tools, which are spelled flat where chat's are nested; what they come to is chat's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from server.api.chat.messages import string_field
from server.api.chat.tools import read_choice
from server.api.tools import ChoiceMode, FunctionDefinition, ToolPlan, plan_calls

TOOL_CHOICE_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "required": ["type", "name"],
            "properties": {"type": {"const": "function"}, "name": {"type": "string"}},
        },
    ]
}


class FunctionTool(FunctionDefinition):
    type: Literal["function"] = Field(description="The only type.")


def plan_function_tools(tools: Sequence[FunctionTool], choice: object, *, parallel: bool) -> ToolPlan | None:
    """None: the answer is text, whatever tools there are. Raises ClientError."""
    if isinstance(choice, dict) and choice.get("type") == "function":
        mode: ChoiceMode = "named"
        name = string_field(choice, "name", "tool_choice")
    else:
        mode, name = read_choice(choice)
    return plan_calls(tools, mode, name, parallel=parallel, parameters_key="parameters")
