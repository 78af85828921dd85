"""Calls found in text, however the text is cut; and text that is no call, untouched and not kept waiting."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence

import pytest

from server.api.tool_calls import CallArguments, CallArrayParser, CallStart, Content, NamedCallParser, Piece

NAMES = ("get", "get_weather", "ns.f:x-1")
NESTED = '{"a":{"b":[1,{"c":"}]\\\\\\"{["}]},"d":"\\\\"}'
ONE = '[{"name":"get","arguments":{}}]'
TWO = '[{"name":"get_weather","arguments":' + NESTED + '},{"name":"ns.f:x-1","arguments":{"x":1}}]'
SPACED = ' [\n { "name" :\t"get" ,\r\n "arguments" : { "x" : [ ] } } , {"name":"get","arguments":{}} ] '


def parser(*, max_calls: int = 16) -> CallArrayParser:
    return CallArrayParser(NAMES, max_calls=max_calls)


def read(texts: Iterable[str], *, max_calls: int = 16) -> tuple[str, list[tuple[str, str]]]:
    """The content and the calls of an answer that came in these pieces."""
    reader = parser(max_calls=max_calls)
    pieces: list[Piece] = []
    for text in texts:
        pieces += reader.push(text)
    return told([*pieces, *reader.flush()])


def told(pieces: Sequence[Piece]) -> tuple[str, list[tuple[str, str]]]:
    content = ""
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        if isinstance(piece, Content):
            assert piece.text
            content += piece.text
        elif isinstance(piece, CallStart):
            assert piece.index == len(calls)
            assert re.fullmatch("call_[0-9a-f]{32}", piece.id)
            calls.append((piece.name, ""))
        else:
            assert piece.text
            assert piece.index == len(calls) - 1
            calls[piece.index] = (calls[piece.index][0], calls[piece.index][1] + piece.text)
    return content, calls


CASES = [
    (ONE, "", [("get", "{}")]),
    (TWO, "", [("get_weather", NESTED), ("ns.f:x-1", '{"x":1}')]),
    (SPACED, "", [("get", '{ "x" : [ ] }'), ("get", "{}")]),
    ('{"name":"get","arguments":{"x":[1]}}', "", [("get", '{"x":[1]}')]),
    # No calls.
    ("Two cats.", "Two cats.", []),
    ("  Two cats.", "  Two cats.", []),
    ("[1, 2]", "[1, 2]", []),
    ("[]", "[]", []),
    ("[[" + ONE, "[[" + ONE, []),
    ('{"name":"unknown","arguments":{}}', '{"name":"unknown","arguments":{}}', []),
    ('{"name":"ge","arguments":{}}', '{"name":"ge","arguments":{}}', []),
    ('{"name":"gets","arguments":{}}', '{"name":"gets","arguments":{}}', []),
    ('{"name":get,"arguments":{}}', '{"name":get,"arguments":{}}', []),
    ('{"name":"get","arguments":"{}"}', '{"name":"get","arguments":"{}"}', []),
    ('{"arguments":{},"name":"get"}', '{"arguments":{},"name":"get"}', []),
    ('{"name":"get","input":{}}', '{"name":"get","input":{}}', []),
    ("{ not json", "{ not json", []),
    ('{"na me":"get","arguments":{}}', '{"na me":"get","arguments":{}}', []),
    ('{"name":"g et","arguments":{}}', '{"name":"g et","arguments":{}}', []),
    (" " * 600 + ONE, " " * 600 + ONE, []),
    # An end before the call is one.
    ('[{"name":"get","argum', '[{"name":"get","argum', []),
    ("[", "[", []),
    (" ", "", []),
    ("", "", []),
    # An end within the call.
    ('[{"name":"get","arguments":{"x":"a', "", [("get", '{"x":"a')]),
    ('[{"name":"get","arguments":{}},', "", [("get", "{}")]),
    ('[{"name":"get","arguments":{}},{"na', '{"na', [("get", "{}")]),
    # What follows the calls.
    (ONE + "\n\nDone.", "Done.", [("get", "{}")]),
    (ONE + ONE, ONE, [("get", "{}")]),
    (f"{ONE[1:-1]},{ONE[1:-1]}", f",{ONE[1:-1]}", [("get", "{}")]),
    ('{"name":"get","arguments":{}} and so on', "and so on", [("get", "{}")]),
    ('[{"name":"get","arguments":{}} oops', "oops", [("get", "{}")]),
    ('[{"name":"get","arguments":{},"x":1}]', ',"x":1}]', [("get", "{}")]),
    ('[{"name":"get","arguments":{}},5]', "5]", [("get", "{}")]),
    (ONE + " a  b ", "a  b ", [("get", "{}")]),
]


@pytest.mark.parametrize(("text", "content", "calls"), CASES)
def test_calls(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    assert read([text]) == (content, calls)
    assert read(text) == (content, calls)  # a character at a time
    chance = random.Random(5)
    for _ in range(20):
        cuts = sorted(chance.choices(range(len(text) + 1), k=4))
        parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert read(parts) == (content, calls), parts


def test_too_many_calls_are_dropped() -> None:
    assert read([TWO], max_calls=1) == ("", [("get_weather", NESTED)])
    assert read(TWO + " Well.", max_calls=1) == ("Well.", [("get_weather", NESTED)])


def test_text_is_held_back_no_longer_than_it_may_become_a_call() -> None:
    reader = parser()
    assert reader.push("Two") == [Content("Two")]
    assert reader.push("[{") == [Content("[{")]
    reader = parser()
    for piece in ("[", '{"name', '": "get', "_w"):
        assert reader.push(piece) == []
    assert reader.push("X") == [Content('[{"name": "get_wX')]


def test_arguments_come_as_they_are_written() -> None:
    reader = parser()
    assert reader.push('[{"name":"get","arguments":') == []
    start, *rest = reader.push('{"a":')
    assert isinstance(start, CallStart)
    assert rest == [CallArguments(0, "{"), CallArguments(0, '"a":')]
    assert reader.push('"}') == [CallArguments(0, '"}')]
    assert reader.push('"}}]') == [CallArguments(0, '"}')]
    assert reader.push("") == reader.flush() == []


@pytest.mark.parametrize(("text", "name"), [(ONE, "tool_calls"), ("words", "stop"), ('[{"name":"get"', "stop")])
def test_why_it_ended(text: str, name: str) -> None:
    reader = parser()
    reader.push(text)
    assert reader.finish_name("stop") == name
    assert reader.finish_name("length") == "length"


def test_ids_are_unique() -> None:
    pieces = parser().push(TWO) + parser().push(TWO)
    assert len({piece.id for piece in pieces if isinstance(piece, CallStart)}) == 4


def test_a_named_call_is_all_of_the_text() -> None:
    reader = NamedCallParser("get")
    pieces = [*reader.push(' {"a":'), *reader.push("1}"), *reader.flush()]
    assert told(pieces) == ("", [("get", ' {"a":1}')])
    assert (reader.finish_name("stop"), reader.finish_name("length")) == ("stop", "length")


def test_a_named_call_starts_without_text() -> None:
    reader = NamedCallParser("get")
    (start,) = reader.push("")
    assert isinstance(start, CallStart)
    assert reader.push("") == []


def test_random_json_arguments() -> None:
    chance = random.Random(7)

    def value(depth: int) -> object:
        kind = chance.randrange(6 if depth < 4 else 4)
        if kind == 4:
            return [value(depth + 1) for _ in range(chance.randrange(3))]
        if kind == 5:
            return {string(): value(depth + 1) for _ in range(chance.randrange(3))}
        return (None, 1.5, True, string())[kind]

    def string() -> str:
        return "".join(chance.choices('ab"\\{}[]\n,:é', k=chance.randrange(8)))

    for _ in range(200):
        wanted = [(chance.choice(NAMES), {string(): value(0)}) for _ in range(chance.randrange(1, 4))]
        text = json.dumps([{"name": n, "arguments": a} for n, a in wanted], indent=chance.choice((None, 2)))
        cut = chance.randrange(len(text))
        content, calls = read([text[:cut], text[cut:]])
        assert content == ""
        assert [(name, json.loads(arguments)) for name, arguments in calls] == wanted
