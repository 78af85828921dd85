"""Hostile requests by the thousand against a real server; and that what must not happen would be noticed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import uvloop

from server.api.chat.protocol import ChatCompletionRequest
from server.api.completions.protocol import CompletionRequest
from server.api.responses.protocol import ResponsesRequest
from server.api.schemas import request_body
from server.api.tokenize import DetokenizeRequest, TokenizeBody
from tests.campaigns.answers import problems
from tests.campaigns.fuzz_requests import STALL, Campaign, own_server
from tests.campaigns.hostile_bodies import CHAT, COMPLETIONS, DETOKENIZE, RESPONSES, TOKENIZE
from tests.campaigns.hostile_requests import Generator, Hostile
from tests.campaigns.wire import Answer

pytestmark = pytest.mark.slow

COUNT = 20_000


def test_twenty_thousand_hostile_requests_do_no_harm() -> None:
    with own_server() as (url, pid, log):
        result = uvloop.run(Campaign(url, seed=0, pid=pid, log=log).run(COUNT))
    print(result.table())
    # How long the loop computes is a figure of the campaign's: on a busy machine its core is not its own.
    assert set(result.misses) <= {STALL}, result.table()
    assert sum(result.families.values()) == COUNT
    answered = {status for _, status in result.statuses}
    assert {"200", "400", "404", "405", "415", "left"} <= answered
    assert all(count > COUNT / 20_000 for count in result.families.values()), result.families
    assert result.neighbours > 5


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """As much of an OpenAPI document as hostile requests are made from."""
    bodies = {
        CHAT: ChatCompletionRequest,
        COMPLETIONS: CompletionRequest,
        RESPONSES: ResponsesRequest,
        TOKENIZE: TokenizeBody,
        DETOKENIZE: DetokenizeRequest,
    }
    return {"paths": {path: {"post": request_body(body, {})} for path, body in bodies.items()}}


def test_a_seed_decides(page: dict[str, Any]) -> None:
    first, again, other = (Generator(page, seed=seed) for seed in (1, 1, 2))
    assert [first.request(n) for n in range(300)] == [again.request(n) for n in range(300)]
    assert first.request(7) != other.request(7)


def test_every_field_of_every_endpoint_is_tried(page: dict[str, Any]) -> None:
    generator = Generator(page, seed=0)
    fields = {(endpoint, path[0]) for endpoint, path, _ in generator._grid}
    for body, endpoint in (
        (ChatCompletionRequest, CHAT),
        (CompletionRequest, COMPLETIONS),
        (ResponsesRequest, RESPONSES),
    ):
        names = {field.alias or name for name, field in body.model_fields.items()}
        assert names <= {name for where, name in fields if where == endpoint}
    paths = {path for _, path, _ in generator._grid}
    assert ("messages", 0, "content", 0, "image_url", "url") in paths
    assert ("response_format", "json_schema", "schema") in paths
    assert generator.grid_size > 20_000


# -- what must not happen is noticed -----------------------------------------------------------------------------------


def answer(status: int, body: Any, kind: str = "application/json", **headers: str) -> Answer:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Answer(status, {"content-type": kind, **headers}, bytearray(content), is_whole=True)


def error(code: str = "x", message: str = "no") -> dict[str, Any]:
    return {"error": {"message": message, "type": "t", "param": None, "code": code}}


def stream(*events: str) -> Answer:
    return answer(200, "".join(f"{event}\n\n" for event in events).encode(), "text/event-stream")


REQUEST = Hostile(number=5, family="f", endpoint="/", pieces=())
HARMLESS = [
    answer(200, {"a": "zqcanary00000005x"}),
    answer(400, error()),
    answer(429, error("queue_full"), **{"retry-after": "1"}),
    answer(503, error("grammar_checker_unavailable"), **{"retry-after": "2"}),
    stream('data: {"choices":[]}', ": keep-alive", "data: [DONE]"),
    stream('event: response.completed\ndata: {"type":"response.completed"}'),
]
HARMFUL = [
    (Answer(200, {}, bytearray(b"x"), is_whole=False), "no whole answer"),
    (answer(200, {"a": "zqcanary00000006x"}), "another request's"),
    (answer(400, error(message="zqcanary00000005x")), "repeats what was sent"),
    (answer(500, error("internal_error")), "500 internal_error"),
    (answer(502, error()), "502"),
    (answer(400, {"detail": "x"}), "no error object"),
    (answer(400, b"oops"), "no error object"),
    (answer(400, {"error": {**error()["error"], "more": 1}}), "odd error object"),
    (answer(429, error("queue_full")), "no Retry-After"),
    (answer(503, error("engine_unavailable"), **{"retry-after": "1"}), "503 engine_unavailable"),
    (answer(200, b"{"), "not JSON"),
    (stream("data: {", "data: [DONE]"), "not JSON"),
    (stream('data: {"choices":[]}'), "without an end"),
    (stream("data: [DONE]"), "without events"),
    (stream('data: {"choices":[]}', "x: y", "data: [DONE]"), "no events"),
    (stream('data: {"error":{"code":"internal_error"}}', "data: [DONE]"), "internal_error"),
    (stream('data: {"error":{"message":"zqcanary00000005x"}}', "data: [DONE]"), "repeats what was sent"),
    (answer(200, b"data: \xff\n\n", "text/event-stream"), "not UTF-8"),
]


@pytest.mark.parametrize("harmless", HARMLESS)
def test_good_answers_are_good(harmless: Answer) -> None:
    assert list(problems(REQUEST, harmless)) == []


@pytest.mark.parametrize(("harmful", "said"), HARMFUL, ids=[said for _, said in HARMFUL])
def test_bad_answers_are_noticed(harmful: Answer, said: str) -> None:
    assert any(said in problem for problem in problems(REQUEST, harmful))
