"""Tools: what those of a request make an answer match, and how the model is told. Shared by the APIs that have them.

Idefics2 was never trained to call functions, so calls that must be made come from a grammar: a named function's
arguments alone, otherwise an array of calls (see `tool_calls.py`, which reads both). Calls that may be made need the
model to know of them: as text before the conversation, and only where the operator wants that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from server.api.errors import invalid_value
from server.api.protocol import Body
from server.api.structured import MAX_SOURCE_BYTES, check_size, schema_source
from server.api.tool_calls import CallArrayParser, CallParser, NamedCallParser
from server.errors import ClientError
from server.types import ChatInput, EngineRequest, GrammarSpec, PromptInput, SamplingParams, TextPart, Turn

if TYPE_CHECKING:
    from server.llm import AsyncLLM

ChoiceMode = Literal["none", "auto", "required", "named"]

MAX_TOOLS = 128
MAX_PARALLEL_CALLS = 16
# Each function may take as long to try as a request may; looking for the one at fault is a courtesy.
_SUSPECTS_SECONDS = 2.0

# A function without parameters takes none.
_NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
# Keywords under which names stand for schemas, and those whose values are data and no schemas.
_SCHEMA_MAPS = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})
_DATA = frozenset({"const", "enum", "default", "examples"})

_MAY_CALL = """You may call these functions:
{definitions}
To call some, answer with a JSON array and nothing else: [{{"name": "a function", "arguments": {{its arguments}}}}]
Otherwise answer in words."""
_MUST_CALL = """Call one or more of these functions:
{definitions}
Answer with a JSON array and nothing else: [{{"name": "a function", "arguments": {{its arguments}}}}]"""
_MUST_CALL_ONE = """Call this function:
{definitions}
Answer with its arguments as a JSON object and nothing else."""


class FunctionDefinition(Body):
    # OpenAI allows no dots and colons, but those who name functions after their server send them.
    name: str = Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.:-]+$")
    description: str = Field("", max_length=MAX_SOURCE_BYTES)
    parameters: dict[str, Any] = Field(
        default=_NO_ARGUMENTS, description="A JSON schema of type 'object'. Absent: there are none."
    )
    strict: bool | None = Field(None, description="Arguments are always kept to the schema.")


@dataclass(frozen=True)
class ToolPlan:
    """What the tools of a request come to.

    name              that of the one function that must be called
    parameters_key    where in a tool the API in question has a function's parameters, for messages
    """

    mode: Literal["auto", "required", "named"]
    functions: tuple[FunctionDefinition, ...]
    parallel: bool
    name: str
    parameters_key: str

    @property
    def max_calls(self) -> int:
        return MAX_PARALLEL_CALLS if self.parallel else 1

    def grammar(self) -> GrammarSpec | None:
        """What an answer must match. Raises ClientError for parameters that no arguments could follow from."""
        if self.mode == "auto":
            return None
        if self.mode == "named":
            return self.suspects()[[function.name for function in self.functions].index(self.name)]
        schemas = [function_schema(function, self.path(index)) for index, function in enumerate(self.functions)]
        check_size("".join(map(_dumps, schemas)), "tools")  # before more is made of them
        source = _dumps(_calls_schema(self.functions, schemas, self.max_calls))
        check_size(source, "tools")
        # With one function there is no doubt whose parameters are at fault.
        return GrammarSpec("json_schema", source, self.path(0) if len(self.functions) == 1 else "tools")

    def path(self, index: int) -> str:
        """How a client finds a function's parameters in its request."""
        return f"tools[{index}].{self.parameters_key}"

    def suspects(self) -> list[GrammarSpec]:
        """Each function's parameters by themselves, to find out which do not compile when all together do not."""
        return [
            GrammarSpec("json_schema", _dumps(function_schema(function, path)), path)
            for function, path in zip(self.functions, map(self.path, range(len(self.functions))), strict=True)
        ]

    def parser(self) -> CallParser:
        if self.mode == "named":
            return NamedCallParser(self.name)
        names = frozenset(function.name for function in self.functions)
        return CallArrayParser(names, max_calls=self.max_calls)

    def described(self) -> Turn:
        """The leading turn that tells the model about the functions."""
        wanted = [function for function in self.functions if self.mode != "named" or function.name == self.name]
        definitions = "\n".join(
            _dumps({"name": f.name, "description": f.description, "parameters": f.parameters}) for f in wanted
        )
        template = {"auto": _MAY_CALL, "required": _MUST_CALL, "named": _MUST_CALL_ONE}[self.mode]
        return Turn(role="system", parts=(TextPart(template.format(definitions=definitions)),))


def plan_calls(
    functions: Sequence[FunctionDefinition], mode: ChoiceMode, name: str, *, parallel: bool, parameters_key: str
) -> ToolPlan | None:
    """None: the answer is text, whatever functions there are. Raises ClientError."""
    if mode in ("required", "named") and not functions:
        raise invalid_value("tool_choice", "may force a call only when there are 'tools'")
    if mode == "named" and all(function.name != name for function in functions):
        raise invalid_value("tool_choice", "must name one of the 'tools'")
    if mode == "none" or not functions:
        return None
    return ToolPlan(mode=mode, functions=tuple(functions), parallel=parallel, name=name, parameters_key=parameters_key)


async def prepare_with_tools(llm: AsyncLLM, chat: ChatInput, tools: ToolPlan | None) -> EngineRequest:
    """`llm.prepare`, whose ClientError names the function at fault where all together do not compile."""
    try:
        return await llm.prepare(chat)
    except ClientError as error:
        if tools is not None and error.param == "tools":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SUSPECTS_SECONDS):
                    await _try_each(llm, chat, tools)
        raise


async def _try_each(llm: AsyncLLM, chat: ChatInput, tools: ToolPlan) -> None:
    """Raises ClientError for the first function that does not compile by itself."""
    for grammar in tools.suspects():
        alone = SamplingParams(max_tokens=1, grammar=grammar)
        await llm.prepare(PromptInput(request_id="tools", prompt="?", sampling=alone, origin=chat.origin))


def function_schema(function: FunctionDefinition, path: str) -> dict[str, Any]:
    """The schema of a function's arguments, which are an object even where the schema forgets to say so.

    Raises ClientError for what it finds at `path`.
    """
    schema = function.parameters
    if not {"type", "$ref", "anyOf", "oneOf", "allOf"} & schema.keys():
        schema = {"type": "object", **schema}
    elif schema.get("type", "object") != "object":
        raise invalid_value(path, "must be a JSON schema of type 'object'")
    schema_source(schema, path)
    return schema


def _calls_schema(
    functions: Sequence[FunctionDefinition], schemas: Sequence[dict[str, Any]], max_calls: int
) -> dict[str, Any]:
    definitions = {}
    calls = []
    for index, (function, schema) in enumerate(zip(functions, schemas, strict=True)):
        place = f"#/$defs/tool{index}"
        own = {key: value for key, value in schema.items() if key not in ("$id", "$schema")}
        definitions[f"tool{index}"] = _moved(own, place)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function.name}, "arguments": {"$ref": place}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    items = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {"type": "array", "items": items, "minItems": 1, "maxItems": max_calls, "$defs": definitions}


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to itself still hold when it stands at `place`.

    A schema with an `$id` of its own stays as it is: its references start there. Depth is the request's, so bounded.
    """
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict) or "$id" in schema:
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            moved[key] = place + value[1:]
        elif key in _SCHEMA_MAPS and isinstance(value, dict):
            moved[key] = {name: _moved(inner, place) for name, inner in value.items()}
        else:
            moved[key] = value if key in _DATA else _moved(value, place)
    return moved


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
