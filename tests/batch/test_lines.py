from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.batch.lines import Rejection, Request, count_lines, parse_line, read_lines

URLS = frozenset({"/v1/chat/completions", "/v1/completions"})
GOOD: dict[str, Any] = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"x": 1}}


def parse(raw: bytes | None, urls: frozenset[str] | None = URLS) -> Request | Rejection:
    return parse_line(7, raw, urls)


def test_a_good_line_keeps_its_body_byte_for_byte() -> None:
    body = '{ "x": 1.50, "big": 123456789012345678901234567890, "text": "\\u00e9 \\u2028 日本", "stream": false }'
    raw = f'{{"body": {body}, "custom_id": "ä", "url": "/v1/completions", "method": "POST", "more": 1}}\r\n'.encode()
    assert parse(raw) == Request(7, "ä", "/v1/completions", body.encode())


@pytest.mark.parametrize("raw", [b"nope", b"{", b'{"a": NaN}', b'{"a": "\xff"}', b"{} {}", b'{"a":' + b"[" * 9999])
def test_what_is_not_json_has_only_its_number(raw: bytes) -> None:
    assert parse(raw) == Rejection(7, None, "invalid_json_line", "the line is not valid JSON")


def test_bytes_that_are_not_utf_8_are_found_inside_the_body_too() -> None:
    raw = json.dumps(GOOD | {"body": {"text": "here"}}).encode().replace(b"here", b"h\xffre")
    assert parse(raw) == Rejection(7, None, "invalid_json_line", "the line is not valid JSON")


@pytest.mark.parametrize(
    ("changes", "custom_id", "code", "param"),
    [
        ({"custom_id": None}, None, "missing_required_parameter", "custom_id"),
        ({"custom_id": 3}, None, "invalid_type", "custom_id"),
        ({"custom_id": ""}, None, "invalid_type", "custom_id"),
        ({"custom_id": ["a"]}, None, "invalid_type", "custom_id"),
        ({"method": "GET"}, "a", "invalid_method", "method"),
        ({"method": "post"}, "a", "invalid_method", "method"),
        ({"method": None}, "a", "invalid_method", "method"),
        ({"url": "/v1/embeddings"}, "a", "invalid_url", "url"),
        ({"url": None}, "a", "invalid_url", "url"),
        ({"url": ["/v1/completions"]}, "a", "invalid_url", "url"),
        ({"url": "http://elsewhere/v1/completions"}, "a", "invalid_url", "url"),
        ({"body": []}, "a", "invalid_type", "body"),
        ({"body": "text"}, "a", "invalid_type", "body"),
        ({"body": None}, "a", "invalid_type", "body"),
        ({"body": {"stream": True}}, "a", "unsupported_value", "body.stream"),
    ],
)
def test_what_is_wrong_is_named_and_never_repeated(
    changes: dict[str, Any], custom_id: str | None, code: str, param: str
) -> None:
    line = parse(json.dumps(GOOD | changes).encode())
    assert isinstance(line, Rejection)
    assert (line.number, line.custom_id, line.code, line.param) == (7, custom_id, code, param)
    assert "elsewhere" not in line.message


@pytest.mark.parametrize(("missing", "code"), [("custom_id", None), ("method", "invalid_method"), ("body", None)])
def test_what_is_missing_is_named(missing: str, code: str | None) -> None:
    line = parse(json.dumps({name: value for name, value in GOOD.items() if name != missing}).encode())
    assert isinstance(line, Rejection)
    assert (line.code, line.param) == (code or "missing_required_parameter", missing)


def test_a_line_that_is_no_object() -> None:
    for raw in (b"[1]", b"3", b"null", b'"text"'):
        assert parse(raw) == Rejection(7, None, "invalid_type", "the line must be a JSON object")


@pytest.mark.parametrize(
    ("url", "good"),
    [
        ("/v1/embeddings", True),
        ("/v1/chat/completions", True),
        ("/v1", False),
        ("/v2/completions", False),
        ("/v1/../admin", False),
        ("/v1//completions", False),
        ("/v1/completions?x=1", False),
        ("/v1/completions\n", False),
        ("@elsewhere/v1/completions", False),
    ],
)
def test_a_server_elsewhere_is_asked_only_below_v1(url: str, good: bool) -> None:
    line = parse(json.dumps(GOOD | {"url": url}).encode(), None)
    assert isinstance(line, Request if good else Rejection)


def test_a_line_too_long_is_passed_over_and_the_next_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"12345\n" + b"x" * 3_000_000 + b"\n123456\nyy")
    assert list(read_lines(path, max_bytes=6)) == [(1, b"12345\n"), (2, None), (3, None), (4, b"yy")]
    rejected = parse(None)
    assert isinstance(rejected, Rejection)
    assert (rejected.code, rejected.custom_id) == ("line_too_long", None)


def test_blank_lines_are_numbered_and_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "in"
    path.write_bytes(b"\xef\xbb\xbf{}\r\n\r\n \t\n{}\n\n")
    assert list(read_lines(path)) == [(1, b"{}\r\n"), (4, b"{}\n")]
    path.write_bytes(b"\xef\xbb\xbf")
    assert list(read_lines(path)) == []


@settings(deadline=None)  # a busy machine's time is not the code's
@given(st.lists(st.binary(max_size=20), max_size=30), st.booleans())
def test_counting_agrees_with_reading(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], end: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "counted"
    path.write_bytes(b"\n".join(parts) + b"\n" * end)
    with path.open("rb") as file:
        assert count_lines(path) == sum(1 for _ in file)
    assert sum(1 for _ in read_lines(path)) <= count_lines(path)


def test_a_long_file_is_never_held(tmp_path: Path) -> None:
    path = tmp_path / "in"
    with path.open("wb") as file:
        for _ in range(400):
            file.write(b'{"custom_id": "a", "body": "' + b"x" * 100_000 + b'"}\n')
    tracemalloc.start()
    try:
        rejected = sum(isinstance(parse_line(*item, URLS), Rejection) for item in read_lines(path))
        assert count_lines(path) == rejected == 400
        assert tracemalloc.get_traced_memory()[1] < 4_000_000  # of 40 MB
    finally:
        tracemalloc.stop()
