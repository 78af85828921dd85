"""What a client writes, each kind as one grammar in the library's notation.

Knows notations; knows neither tokens nor states. Nothing of a client's text becomes part of a message.
"""

from __future__ import annotations

import json
import re

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark

from server.errors import ClientError
from server.grammar.json_schema import ends_cleanly, parse_json, prepare_schema
from server.types import GrammarSpec

MAX_SOURCE_BYTES = 64 << 10
KINDS = {
    "json_schema": "the JSON schema",
    "regex": "the regular expression",
    "choice": "the list of choices",
    "grammar": "the grammar",
}

# Any tokens that spell the text will do: which ones a tokenizer would have chosen, the model knows best.
_HEAD = '%llguidance {"no_forcing": true}\n'
# In Lark: a comment, a string, or a regular expression; longest first where one could be another.
_COMMENT_OR_LITERAL = r'(?:#|//)[^\n]*|"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\])+/'
_LITERAL = re.compile(_COMMENT_OR_LITERAL)
_LITERAL_OR_JSON = re.compile(f"{_COMMENT_OR_LITERAL}|%json\\s*")
_OPTIONS = re.compile(r"%llguidance(?!\s*\{\s*\})")
# Attributes that end a rule by tokens or by hidden text, which the visible text would not show.
_ATTRIBUTE = re.compile(r"\[[^\]]*\b(?:stop|stop_capture|max_tokens|temperature)\b[^\]]*\]\s*:")


def check_size(spec: GrammarSpec) -> None:
    """Raises ClientError for a source that is too large or is no Unicode text."""
    try:
        size = len(spec.source.encode())
    except UnicodeEncodeError:
        raise ClientError(f"{KINDS[spec.kind]} holds half of a surrogate pair", param=spec.param) from None
    if size > MAX_SOURCE_BYTES:
        raise ClientError(
            f"{KINDS[spec.kind]} takes {size} bytes; at most {MAX_SOURCE_BYTES} are allowed", param=spec.param
        )


def to_library_grammar(spec: GrammarSpec) -> str:
    """The library's JSON list of grammars for a source. Raises ClientError for what is not supported."""
    check_size(spec)
    if spec.kind == "json_schema":
        schema = parse_json(spec.source, what=KINDS[spec.kind], param=spec.param)
        prepared = prepare_schema(schema, param=spec.param)
        named = {"name": "schema", "json_schema": prepared}
        return json.dumps({"grammars": [{"lark_grammar": f"{_HEAD}start: @schema"}, named]})
    lark = {"regex": _regex, "choice": _choice, "grammar": _grammar}[spec.kind](spec)
    return json.dumps({"grammars": [{"lark_grammar": _HEAD + lark}]})


def _regex(spec: GrammarSpec) -> str:
    if not spec.source:
        raise ClientError("the regular expression is empty", param=spec.param)
    if not ends_cleanly(spec.source):
        raise ClientError("the regular expression ends in a backslash", param=spec.param)
    return f"start: TEXT\nTEXT: /{regex_to_lark(spec.source, '')}/"


def _choice(spec: GrammarSpec) -> str:
    choices = parse_json(spec.source, what=KINDS[spec.kind], param=spec.param)
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise ClientError("choices are a list of one string or more", param=spec.param)
    if not all(choices):
        raise ClientError("a choice is an empty string", param=spec.param)
    return "start: TEXT\nTEXT: " + " | ".join(_quote(choice, param=spec.param) for choice in choices)


def _quote(text: str, *, param: str) -> str:
    """A string in Lark's notation, which is JSON's, but for a DEL character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ClientError("a choice holds half of a surrogate pair", param=param) from None
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _grammar(spec: GrammarSpec) -> str:
    text = spec.source
    if "::=" in _LITERAL.sub('""', text):  # which Lark has only within literals
        text = _from_gbnf(text, param=spec.param)
    text = _prepare_schemas(text, param=spec.param)
    bare = _LITERAL.sub('""', text)
    if "<" in bare:
        raise ClientError("the grammar names special tokens (<...>), which are not supported", param=spec.param)
    if _OPTIONS.search(bare):
        raise ClientError("the grammar sets options by %llguidance, which are not supported", param=spec.param)
    if _ATTRIBUTE.search(bare):
        raise ClientError("the attributes stop, max_tokens and temperature are not supported", param=spec.param)
    return text


def _from_gbnf(text: str, *, param: str) -> str:
    try:
        return gbnf_to_lark(text)
    except Exception:
        # The converter raises bare exceptions, and RecursionError for deep nesting.
        raise ClientError("the grammar is not valid GBNF", param=param) from None


def _prepare_schemas(text: str, *, param: str) -> str:
    """Each `%json {...}` in a Lark grammar as `prepare_schema` makes it."""
    done, position = [], 0
    while match := _LITERAL_OR_JSON.search(text, position):
        done.append(text[position : match.end()])
        position = match.end()
        if match[0].startswith("%json"):
            try:
                _, end = json.JSONDecoder().raw_decode(text, position)
            except (ValueError, RecursionError):
                raise ClientError("a %json in the grammar is not followed by valid JSON", param=param) from None
            schema = parse_json(text[position:end], what="a %json in the grammar", param=param)
            done.append(json.dumps(prepare_schema(schema, param=param), ensure_ascii=False))
            position = end
    return "".join(done) + text[position:]
