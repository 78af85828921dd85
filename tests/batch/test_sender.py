"""When a line is sent again, and when not, against a real server that refuses and breaks off."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse, Response

from server.batch.output import RunStopped
from server.batch.sender import Abandoned, Answer, LineFailed, Patience, Sender, Target, retry_after
from tests.batch.canned import CannedServer, Script, answer, cut, refusal
from tests.batch.files import CHAT
from tests.serving import free_port

Use = Callable[[Sender, asyncio.Event], Awaitable[Any]]


def with_sender(base_url: str, use: Use, *, is_dead: bool = False, **patience: Any) -> Any:
    async def main() -> Any:
        stopping = asyncio.Event()
        async with httpx.AsyncClient(base_url=base_url, timeout=5.0) as client:
            target = Target(client, is_dead=lambda: is_dead)
            return await use(Sender(target, Patience(**patience), stopping), stopping)

    return asyncio.run(main())


def send(script: Script, **patience: Any) -> tuple[Answer, CannedServer, float]:
    """Send one request until there is an answer; also what the server saw, and the seconds it took."""
    with CannedServer(script).running() as server:
        started = time.perf_counter()
        sent = with_sender(server.url, lambda sender, _: sender.send(CHAT, b'{"name": "x"}'), **patience)
        return sent, server, time.perf_counter() - started


def sequence(*replies: Response | Callable[[], Response]) -> Script:
    async def script(name: str, attempt: int) -> Response:
        reply = replies[min(attempt, len(replies) - 1)]
        return reply if isinstance(reply, Response) else reply()

    return script


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_waited_for_as_long_as_it_says(status: int) -> None:
    sent, server, seconds = send(sequence(refusal(status, **{"retry-after": "0.8"}), answer("x")))
    assert (sent.status, sent.request_id, sent.tokens_in, sent.tokens_out) == (200, "req-x", 3, 2)
    assert len(server.asked) == 2
    assert 0.8 <= seconds < 2.5


def test_a_busy_server_that_does_not_say_is_asked_less_and_less_often() -> None:
    _, server, seconds = send(sequence(refusal(429), refusal(429), answer("x")))
    assert len(server.asked) == 3
    assert 0.5 + 1.0 <= seconds < 3.5


def test_a_busy_answer_is_kept_in_the_end() -> None:
    sent, server, _ = send(sequence(refusal(503, **{"retry-after": "0.2"})), max_wait=0.3)
    assert (sent.status, sent.tokens_out) == (503, 0)
    assert json.loads(sent.body)["error"]["code"] == "no"
    assert len(server.asked) == 3


@pytest.mark.parametrize("status", [400, 403, 404, 413, 500, 502])
def test_other_statuses_are_answers(status: int) -> None:
    sent, server, _ = send(sequence(refusal(status)))
    assert sent.status == status
    assert len(server.asked) == 1


def test_a_broken_connection_is_tried_again() -> None:
    sent, server, seconds = send(sequence(cut, answer("x")))
    assert sent.status == 200
    assert len(server.asked) == 2
    assert seconds >= 0.5


def test_a_line_that_breaks_every_connection_is_to_blame_itself() -> None:
    with pytest.raises(LineFailed, match="no answer in 2 attempts") as caught:
        send(sequence(cut), retries=1)
    assert caught.value.code == "connection_error"


def test_a_server_that_is_gone_ends_the_run() -> None:
    with pytest.raises(RunStopped, match="cannot be reached"):
        with_sender(f"http://127.0.0.1:{free_port()}", lambda sender, _: sender.send(CHAT, b"{}"), retries=0)


def test_a_refused_key_ends_the_run() -> None:
    with pytest.raises(RunStopped, match="key"):
        send(sequence(refusal(401)))


def test_a_dead_engine_is_not_waited_for() -> None:
    with CannedServer(sequence(refusal(503))).running() as server, pytest.raises(RunStopped, match="engine"):
        with_sender(server.url, lambda sender, _: sender.send(CHAT, b'{"name": "x"}'), is_dead=True)


@pytest.mark.parametrize("text", ["<html>", "", "[1]", '"text"', '{"a": }', '{"a": "\xff"}'])
def test_an_answer_that_cannot_be_kept_fails_its_line(text: str) -> None:
    with pytest.raises(LineFailed, match="answered 200 with a body that is not") as caught:
        send(sequence(PlainTextResponse(text.encode("latin-1"))))
    assert caught.value.code == "invalid_response"


def test_an_answer_is_kept_as_it_is_on_one_line() -> None:
    pretty = '{\n  "a": 1.50,\r\n  "b": [1, 2],\n  "text": "\\u00e9\\n é",\n  "big": 123456789012345678901\n}\n'
    sent, _, _ = send(sequence(PlainTextResponse(pretty)))
    assert sent.body.decode() == '{"a":1.50,"b":[1,2],"text":"\\u00e9\\n é","big":123456789012345678901}'
    assert sent.request_id is None


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 7}, (5, 7)),
        ({"input_tokens": 5, "output_tokens": 7}, (5, 7)),
        ({"prompt_tokens": None}, (0, 0)),
        (None, (0, 0)),
        ([1], (0, 0)),
    ],
)
def test_tokens_are_counted_in_every_dialect(usage: Any, counts: tuple[int, int]) -> None:
    sent, _, _ = send(sequence(PlainTextResponse(json.dumps({"usage": usage}))))
    assert (sent.tokens_in, sent.tokens_out) == counts


def test_a_stop_ends_waiting_and_begins_nothing() -> None:
    async def use(sender: Sender, stopping: asyncio.Event) -> None:
        waiting = asyncio.create_task(sender.send(CHAT, b'{"name": "x"}'))
        await asyncio.wait_for(asyncio.to_thread(asked.wait), 10.0)
        stopping.set()
        with pytest.raises(Abandoned):
            await asyncio.wait_for(waiting, 2.0)
        with pytest.raises(Abandoned):
            await sender.send(CHAT, b'{"name": "y"}')

    async def script(name: str, attempt: int) -> Response:
        asked.set()
        return refusal(429, **{"retry-after": "100"})

    asked = threading.Event()
    with CannedServer(script).running() as server:
        with_sender(server.url, use)
    assert server.asked == ["x"]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("2", 2.0),
        ("0.5", 0.5),
        ("9999", 120.0),
        ("0", None),
        ("-1", None),
        ("nan", None),
        ("inf", None),
        (None, None),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None),
    ],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert retry_after(header) == seconds
