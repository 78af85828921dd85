"""What a request wants its answer to match → one GrammarSpec.

Clients say it in many ways: OpenAI's `response_format`, vLLM's `structured_outputs` and the older `guided_*`, SGLang's
`regex`, TGI's `grammar`. None of them is ever ignored, and two that differ are refused. Whether a schema or an
expression can be compiled is known further down; here only shapes and sizes are checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field
from pydantic_core import from_json

from server.api.errors import invalid_type, invalid_value, missing
from server.api.protocol import Body
from server.errors import ClientError
from server.types import GrammarSpec

MAX_SOURCE_BYTES = 64 << 10  # of a schema, an expression, a grammar or all choices together
MAX_CHOICE_STRINGS = 4096

ANY_OBJECT = '{"type":"object"}'

_SCHEMA_FIELD: dict[str, Any] = {"anyOf": [{"type": "object"}, {"type": "boolean"}, {"type": "string"}]}

# Never validated when absent, so that an empty list is one that a client sent, and refused.
Choices = Annotated[list[str], FailFast(), Field(default_factory=list, min_length=1, max_length=MAX_CHOICE_STRINGS)]


class JsonSchemaFormat(Body):
    """`strict` and `description` change nothing here: a schema is always kept to, and the model never sees it."""

    name: str | None = Field(None, pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = Field(None, max_length=MAX_SOURCE_BYTES)
    schema_: Any = Field(None, alias="schema", json_schema_extra=_SCHEMA_FIELD)
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema", "json", "regex", "structural_tag"] = Field(
        description="'json' and 'regex' are TGI's, with a 'value'; 'structural_tag' is not supported."
    )
    json_schema: JsonSchemaFormat | None = None
    schema_: Any = Field(None, alias="schema", description="With 'json_object': a schema.")
    value: Any = Field(None, description="With 'json' or 'json_object' a schema, with 'regex' an expression.")


class StructuredOutputs(Body):
    """Exactly one of `json`, `regex`, `choice`, `grammar` and `json_object`. Other keys are hints."""

    json_: Any = Field(None, alias="json", json_schema_extra=_SCHEMA_FIELD)
    regex: str | None = None
    choice: Choices
    grammar: str | None = Field(None, description="In Lark's notation.")
    json_object: bool = False
    structural_tag: Any = Field(None, description="Not supported.")
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = Field(None, max_length=MAX_SOURCE_BYTES)


class TaggedGrammar(Body):
    """TGI's way: what `value` is follows from `type`."""

    type: Literal["json", "json_object", "json_schema", "regex"]
    value: Any = Field(description="A schema or an expression.")


class ConstrainedRequest(Body):
    """Base of the bodies whose answer can be constrained."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = Field(None, json_schema_extra=_SCHEMA_FIELD, description="The same as structured_outputs.json.")
    guided_regex: str | None = Field(None, description="The same as structured_outputs.regex.")
    guided_choice: Choices
    guided_grammar: str | None = Field(None, description="The same as structured_outputs.grammar.")
    regex: str | None = Field(None, description="The same as structured_outputs.regex.")
    grammar: TaggedGrammar | None = None


def find_grammar(request: ConstrainedRequest, own: GrammarSpec | None = None) -> GrammarSpec | None:
    """The one thing that the answer must match, or None. `own` is a constraint that only this endpoint knows.

    Raises ClientError for shapes, for sizes, and when two fields ask for different things.
    """
    found = own
    for spec in _specs(request):
        if found is not None and (spec.kind, spec.source) != (found.kind, found.source):
            raise invalid_value(spec.param, f"and '{found.param}' both constrain the answer; give one of them")
        found = found or spec
    return found


def schema_source(schema: object, param: str) -> str:
    """A JSON schema, or its text, → compact text in which keys keep their order. The model writes in that order."""
    if isinstance(schema, str):
        check_size(schema, param)
        try:
            schema = from_json(schema, allow_inf_nan=False)
        except ValueError:
            raise invalid_value(param, "must be a JSON schema, but is not valid JSON") from None
    if not isinstance(schema, dict | bool):
        raise invalid_type(param, "a JSON schema: an object, true or false")
    _check_least_size(schema, param)
    try:
        source = json.dumps(schema, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:  # a number that is too large for a float
        raise invalid_value(param, "must have finite numbers") from None
    check_size(source, param)
    return source


def check_size(source: str, param: str) -> None:
    size = len(source.encode())
    if size > MAX_SOURCE_BYTES:
        raise invalid_value(param, f"must have at most {MAX_SOURCE_BYTES} bytes, but has {size}")


def _check_least_size(value: object, param: str) -> None:
    """Refuse what cannot be written within the bound, before it is written: each value takes a byte at least."""
    size = 0
    pending = [value]
    while pending:
        if size + len(pending) > MAX_SOURCE_BYTES:
            least = size + len(pending)
            raise invalid_value(param, f"must have at most {MAX_SOURCE_BYTES} bytes, but has at least {least}")
        value = pending.pop()
        size += len(value) if isinstance(value, str) else 1
        if isinstance(value, list):
            pending += value
        elif isinstance(value, dict):
            pending += value.values()


def response_format_spec(given: ResponseFormat, param: str = "response_format") -> GrammarSpec | None:
    """What `response_format` asks for; None for plain text. Raises ClientError."""
    if given.type == "text":
        return None
    if given.type == "structural_tag":
        message = f"this value of '{param}.type' is not supported; 'json_schema' is"
        raise ClientError(message, param=param, code="unsupported_value")
    if given.type == "regex":
        return _regex(given.value, param, f"{param}.value")
    if given.type == "json_schema":
        return _json_schema(given, param)
    for schema in (given.value, given.schema_):
        if schema is not None:
            return GrammarSpec("json_schema", schema_source(schema, param), param)
    if given.type == "json":
        raise missing(f"{param}.value")
    return GrammarSpec("json_schema", ANY_OBJECT, param)


def _json_schema(given: ResponseFormat, param: str) -> GrammarSpec:
    if given.json_schema is not None:
        schema: Any = given.json_schema.schema_
    elif isinstance(given.value, dict):  # TGI's spelling of the same
        schema = given.value.get("schema")
    else:
        raise missing(f"{param}.json_schema")
    return GrammarSpec("json_schema", ANY_OBJECT if schema is None else schema_source(schema, param), param)


def _specs(request: ConstrainedRequest) -> Iterator[GrammarSpec]:
    if request.structured_outputs is not None:
        yield _structured(request.structured_outputs)
    if request.guided_json is not None:
        yield GrammarSpec("json_schema", schema_source(request.guided_json, "guided_json"), "guided_json")
    if request.guided_regex is not None:
        yield _regex(request.guided_regex, "guided_regex")
    if request.guided_choice:
        yield _choice(request.guided_choice, "guided_choice")
    if request.guided_grammar is not None:
        yield _grammar(request.guided_grammar, "guided_grammar")
    if request.regex is not None:
        yield _regex(request.regex, "regex")
    if request.grammar is not None:
        yield _tagged(request.grammar)
    if request.response_format is not None:
        spec = response_format_spec(request.response_format)
        if spec is not None:
            yield spec


def _structured(given: StructuredOutputs, param: str = "structured_outputs") -> GrammarSpec:
    if given.structural_tag is not None:
        message = f"'{param}.structural_tag' is not supported; 'json', 'regex', 'choice' and 'grammar' are"
        raise ClientError(message, param=f"{param}.structural_tag", code="unsupported_value")
    specs = []
    if given.json_ is not None:
        path = f"{param}.json"
        specs.append(GrammarSpec("json_schema", schema_source(given.json_, path), path))
    if given.regex is not None:
        specs.append(_regex(given.regex, f"{param}.regex"))
    if given.choice:
        specs.append(_choice(given.choice, f"{param}.choice"))
    if given.grammar is not None:
        specs.append(_grammar(given.grammar, f"{param}.grammar"))
    if given.json_object:
        specs.append(GrammarSpec("json_schema", ANY_OBJECT, f"{param}.json_object"))
    if len(specs) != 1:
        raise invalid_value(
            param, f"must have exactly one of 'json', 'regex', 'choice', 'grammar' and 'json_object', not {len(specs)}"
        )
    return specs[0]


def _tagged(given: TaggedGrammar, param: str = "grammar") -> GrammarSpec:
    if given.type == "regex":
        return _regex(given.value, param, f"{param}.value")
    schema = given.value
    if given.type == "json_schema" and isinstance(schema, dict) and "schema" in schema:
        schema = schema["schema"]
    return GrammarSpec("json_schema", schema_source(schema, param), param)


def _regex(expression: object, param: str, path: str | None = None) -> GrammarSpec:
    """`path` is where the expression itself stands, if that is deeper than the field at fault."""
    if expression is None:
        raise missing(path or param)
    if not isinstance(expression, str):
        raise invalid_type(path or param, "a string")
    check_size(expression, param)
    return GrammarSpec("regex", expression, param)


def _choice(choices: list[str], param: str) -> GrammarSpec:
    _check_least_size(choices, param)
    source = json.dumps(choices, ensure_ascii=False, separators=(",", ":"))
    check_size(source, param)
    return GrammarSpec("choice", source, param)


def _grammar(grammar: str, param: str) -> GrammarSpec:
    check_size(grammar, param)
    return GrammarSpec("grammar", grammar, param)
