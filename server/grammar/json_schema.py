"""JSON schemas: what is refused by name, and how JSON is written. What the library would ignore is refused here.

Knows JSON Schema; knows neither tokens nor states.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn
from urllib.parse import quote, unquote

from server.errors import ClientError

MAX_NESTING = 64
# One space, or a line break and its indentation. Where any run is allowed, a model may never come out of it.
WHITESPACE = r" |\n[ \t]{0,16}"
OPTIONS = {
    "whitespace_pattern": WHITESPACE,
    # No \uXXXX: the library takes "\u0061" for another key than "a". Characters stand for themselves.
    "json_allowed_escapes": 'nrbtf\\"',
}

FORMATS = ("date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid")
# Of all drafts, because a keyword of another draft was written to be obeyed, too.
_UNSUPPORTED = frozenset(
    {
        "$dynamicRef",
        "$recursiveRef",
        "contains",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "disallow",
        "divisibleBy",
        "else",
        "extends",
        "if",
        "maxContains",
        "minContains",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
    }
)
# Names of schemas and drafts. References are by path, and every draft is read as 2020-12, but for arrays as `items` and
# booleans as `exclusiveMinimum`; that is never less strict. To the library, an older draft has fewer keywords.
_NAMES = ("$schema", "$id", "id", "$anchor", "$dynamicAnchor", "$recursiveAnchor")
_SCHEMA = ("items", "additionalItems", "additionalProperties")
_SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_PATH_SAFE = "/~!$&'()*+,;=:@"
# Characters that JSON writes as \uXXXX alone, and ways to say one of them in a pattern.
_UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
_UNWRITABLE_ESCAPE = re.compile(r"\\(?:x\{?0*[01]|x\{?0*7[fF]|u\{?0*[01]?[0-9a-fA-F]\b|u\{?0*7[fF]|c|a|v|0)")
_NEGATED_CLASS = re.compile(r"\[\^(?:\\.|[^\]\\])*\]")


def parse_json(text: str, *, what: str, param: str) -> Any:
    """The value of a JSON text. Raises ClientError where it is none, or too deep."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        depth = _depth(value)
    except (ValueError, RecursionError):
        raise ClientError(f"{what} is not valid JSON", param=param) from None
    if depth > MAX_NESTING:
        raise ClientError(f"{what} is nested {depth} levels deep; at most {MAX_NESTING} are allowed", param=param)
    return value


def prepare_schema(schema: Any, *, param: str) -> dict[str, Any]:
    """A parsed schema in the library's terms, made of the parts of the given one, which is changed.

    Raises ClientError for what would not be obeyed to the letter.
    """
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ClientError("a JSON schema is an object", param=param)
    try:
        _check_all(schema)
    except _UnsupportedError as error:
        raise ClientError(f"the JSON schema is not supported: {error}", param=param) from None
    return schema | {"x-guidance": OPTIONS}


class _UnsupportedError(Exception):
    """The message may be shown: it holds names of keywords, never the client's own."""


def _refuse_constant(_: str) -> NoReturn:
    raise ValueError("NaN and Infinity are not JSON")


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [child for parent in level for child in _children(parent)]
    return depth


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _check_all(root: dict[str, Any]) -> None:
    """Check every schema that can be reached from the root, by nesting or by reference."""
    pending: list[Any] = [root]
    seen: set[int] = set()
    has_reference = has_base = False
    while pending:
        schema = pending.pop()
        if not isinstance(schema, dict) or id(schema) in seen:
            continue
        seen.add(id(schema))
        has_base |= schema is not root and any(_is_base(schema.get(key)) for key in ("$id", "id"))
        for name in _NAMES:
            schema.pop(name, None)
        _check_keywords(schema)
        pending += _subschemas(schema)
        if "$ref" in schema:
            has_reference = True
            path = _path(schema["$ref"])
            pending.append(_resolve(root, path))
            schema["$ref"] = "#" + quote(path, safe=_PATH_SAFE)
    if has_reference and has_base:
        raise _UnsupportedError("$ref beside an $id within the schema")


def _is_base(value: object) -> bool:
    return isinstance(value, str) and not value.startswith("#")


def _check_keywords(schema: dict[str, Any]) -> None:
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    for keyword in ("uniqueItems", *sorted(_UNSUPPORTED)):
        if keyword in schema:
            raise _UnsupportedError(f"the keyword {keyword} is not supported")
    if schema.get("format", "date") not in FORMATS:
        _check_format(schema)
    required, least = schema.get("required", ()), schema.get("minProperties", 0)
    if isinstance(required, list) and isinstance(least, int) and least > len(required) + 1:
        # A key may come twice and count twice; the library cannot tell.
        raise _UnsupportedError("minProperties may exceed the number of required properties by 1 at most")
    for pattern in (schema.get("pattern"), *_keys(schema.get("patternProperties"))):
        if isinstance(pattern, str):
            _check_pattern(pattern)
    for constant in (schema.get("const"), schema.get("enum")):
        _check_constant(constant)


def _check_format(schema: Mapping[str, Any]) -> None:
    types = schema.get("type", "string")
    if types == "string" or (isinstance(types, list) and "string" in types):
        raise _UnsupportedError(f"of format only {', '.join(FORMATS)} are supported")


def _check_pattern(pattern: str) -> None:
    rest = _NEGATED_CLASS.sub("", pattern)
    if _UNWRITABLE.search(rest) or _UNWRITABLE_ESCAPE.search(rest.replace("\\\\", "")):
        raise _UnsupportedError("a pattern asks for a control character")
    if not ends_cleanly(pattern):
        raise _UnsupportedError("a pattern ends in a backslash")


def _check_constant(constant: Any) -> None:
    pending = [constant]
    while pending:
        value = pending.pop()
        if isinstance(value, str) and _UNWRITABLE.search(value):
            raise _UnsupportedError("const or enum holds a control character")
        pending += _children(value)


def ends_cleanly(pattern: str) -> bool:
    """Whether a regular expression ends in an even number of backslashes. The library drops a single one."""
    return (len(pattern) - len(pattern.rstrip("\\"))) % 2 == 0


def _subschemas(schema: Mapping[str, Any]) -> Iterator[Any]:
    for key in _SCHEMA:
        yield schema.get(key)
    for key in _SCHEMA_LISTS:
        value = schema.get(key)
        if isinstance(value, list):
            yield from value
    for key in _SCHEMA_MAPS:
        value = schema.get(key)
        if isinstance(value, dict):
            yield from value.values()


def _keys(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value


def _path(reference: object) -> str:
    """The JSON pointer in a $ref. Raises _UnsupportedError where it leads out of the schema."""
    if reference != "#" and not (isinstance(reference, str) and reference.startswith("#/")):
        raise _UnsupportedError("$ref may only point into the schema itself, as in #/$defs/name")
    return unquote(str(reference)[1:])


def _resolve(root: Any, path: str) -> Any:
    """What a JSON pointer points to. Raises _UnsupportedError where that is nothing."""
    found = root
    for part in path.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            raise _UnsupportedError("a $ref points to nothing")
    return found
