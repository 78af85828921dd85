"""A responses request's tools, which are spelled flat where chat's are nested; what they come to is chat's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from pydantic import Field

from server.api.chat.messages import string_field
from server.api.chat.tools import FunctionDefinition, ToolDefinition, ToolPlan, plan_tools
from server.errors import ClientError
from server.types import GrammarSpec

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

_NESTED = ".function.parameters"
_FLAT = ".parameters"


class FunctionTool(FunctionDefinition):
    type: Literal["function"] = Field(description="The only type.")


def plan_function_tools(tools: Sequence[FunctionTool], choice: object, *, parallel: bool) -> ToolPlan | None:
    """None: the answer is text, whatever tools there are. Raises ClientError."""
    if isinstance(choice, dict) and choice.get("type") == "function":
        choice = {"type": "function", "function": {"name": string_field(choice, "name", "tool_choice")}}
    definitions = [ToolDefinition(type="function", function=tool) for tool in tools]
    return plan_tools(definitions, choice, parallel=parallel)


def calls_grammar(plan: ToolPlan) -> GrammarSpec | None:
    """What an answer must match. Raises ClientError."""
    try:
        grammar = plan.grammar()
    except ClientError as error:
        raise _flat_error(error) from None
    return None if grammar is None else _flat_grammar(grammar)


def suspects(plan: ToolPlan) -> list[GrammarSpec]:
    """Each function's parameters by themselves, to find out which do not compile when all together do not."""
    return [_flat_grammar(grammar) for grammar in plan.suspects()]


def _flat_grammar(grammar: GrammarSpec) -> GrammarSpec:
    return msgspec.structs.replace(grammar, param=grammar.param.replace(_NESTED, _FLAT))


def _flat_error(error: ClientError) -> ClientError:
    param = None if error.param is None else error.param.replace(_NESTED, _FLAT)
    return ClientError(error.message.replace(_NESTED, _FLAT), param=param, code=error.code)
