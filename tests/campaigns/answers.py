"""What must hold for every answer to a hostile request."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from tests.campaigns.hostile_requests import CANARY_PREFIX, Hostile
from tests.campaigns.wire import Answer

_CANARY = re.compile(rb"zqcanary(\d{8})x")
_PARSER_ANSWER = b"Invalid HTTP request received."
_LAST_EVENTS = ("response.completed", "response.incomplete", "response.failed", "error")
# Codes of answers that say "not now" about the server as a whole, and of none that a request alone brings about.
_BUSY_CODES = ("queue_full", "rate_limit_exceeded", "grammar_checker_unavailable", "image_worker_unavailable")


def problems(request: Hostile, answer: Answer) -> Iterator[str]:
    """What is wrong with an answer, in words that can be counted."""
    if not answer.is_whole:
        if not request.may_hang_up:
            yield f"no whole answer ({answer.status})"
        return
    body = bytes(answer.body)
    others = {number for number in _CANARY.findall(body) if int(number) != request.number}
    if others:
        yield f"an answer repeats another request's text ({answer.status})"
    if answer.status >= 400:
        yield from _error_problems(request, answer, body)
    elif answer.media_type == "text/event-stream":
        yield from _stream_problems(body)
    elif answer.media_type == "application/json" and not _is_json(body):
        yield f"not JSON ({answer.status})"


def _error_problems(request: Hostile, answer: Answer, body: bytes) -> Iterator[str]:
    if request.may_hang_up and body == _PARSER_ANSWER:
        return
    if CANARY_PREFIX.encode() in body:
        yield f"an error repeats what was sent ({answer.status})"
    if not request.has_answer_body:
        return
    try:
        error = json.loads(body)["error"]
        shape = {key: type(error[key]) for key in ("message", "type", "param", "code")}
        code = error["code"]
    except (ValueError, KeyError, TypeError):
        yield f"no error object ({answer.status})"
        return
    if set(error) != set(shape) or shape["message"] is not str or shape["type"] is not str:
        yield f"an odd error object ({answer.status})"
    if answer.status in (429, 503):
        if not answer.headers.get("retry-after", "").isdecimal():
            yield f"no Retry-After ({answer.status} {code})"
        if code not in _BUSY_CODES:
            yield f"{answer.status} {code}"
    elif answer.status >= 500:
        yield f"{answer.status} {code}"


def _stream_problems(body: bytes) -> Iterator[str]:
    try:
        text = body.decode()
    except UnicodeDecodeError:
        yield "a stream is not UTF-8"
        return
    data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    if any(line and not line.startswith(("data: ", "event: ", ":")) for line in text.split("\n")):
        yield "a stream has lines that are no events"
    events = [event for event in data if event != "[DONE]"]
    try:
        parsed = [json.loads(event) for event in events]
    except ValueError:
        yield "an event is not JSON"
        return
    if not parsed:
        yield "a stream without events"
        return
    if data[-1] != "[DONE]" and parsed[-1].get("type") not in _LAST_EVENTS:
        yield "a stream without an end"
    for event in parsed:
        error = event.get("error") or (event.get("response") or {}).get("error")
        if error is None:
            continue
        if CANARY_PREFIX in json.dumps(error):
            yield "an error event repeats what was sent"
        if error.get("code") in ("internal_error", "server_error", "engine_unavailable"):
            yield f"an error event {error.get('code')}"


def streamed_text(body: bytes | bytearray) -> str:
    """The text of a chat's one answer, however many events it came in."""
    events = [line.removeprefix("data: ") for line in body.decode().split("\n") if line.startswith("data: {")]
    choices = [choice for event in events for choice in json.loads(event).get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def _is_json(body: bytes) -> bool:
    try:
        json.loads(body)
    except ValueError:
        return False
    return True
