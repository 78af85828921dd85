"""How the conformance cases speak to a server, and what they demand of everything that it answers.

Knows HTTP, OpenAI's shapes and server-sent events, and nothing of the server's insides. Each whole answer, each error
and each stream that passes through here is checked against what holds for all of them, whatever the case is about.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.serving import Server

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MODEL, ALIAS = "tiny", "org/tiny"
STREAM_SECONDS = 60.0
REASONS = ("stop", "length", "tool_calls")
TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "server_error"}

Json = dict[str, Any]


def text(content: str) -> Json:
    return {"type": "text", "text": content}


def data_url(file: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(file).decode()}"


def picture(source: bytes | str, detail: str | None = None) -> Json:
    """A part with a picture: a file, or a URL as it is."""
    url = data_url(source) if isinstance(source, bytes) else source
    return {"type": "image_url", "image_url": {"url": url} | ({"detail": detail} if detail else {})}


def user(*parts: Json | str) -> Json:
    return {"role": "user", "content": [text(part) if isinstance(part, str) else part for part in parts]}


def force(content: str) -> Json:
    """The fields that make a model, whatever its weights, say exactly this."""
    return {"structured_outputs": {"choice": [content]}}


def messages_of(conversation: str | Sequence[Json]) -> list[Json]:
    return [{"role": "user", "content": conversation}] if isinstance(conversation, str) else list(conversation)


@dataclass
class Answer:
    """A whole answer: its JSON, and short names for what cases ask most."""

    body: Json
    headers: httpx.Headers

    @property
    def choices(self) -> list[Json]:
        choices: list[Json] = self.body["choices"]
        return choices

    @property
    def texts(self) -> list[str]:
        return [choice["message"]["content"] for choice in self.choices]

    @property
    def text(self) -> str:
        (only,) = self.texts
        return only

    @property
    def reason(self) -> str:
        (only,) = self.choices
        reason: str = only["finish_reason"]
        return reason

    @property
    def usage(self) -> Json:
        usage: Json = self.body["usage"]
        return usage

    @property
    def prompt_tokens(self) -> int:
        return int(self.usage["prompt_tokens"])

    @property
    def completion_tokens(self) -> int:
        return int(self.usage["completion_tokens"])

    @property
    def cached_tokens(self) -> int:
        return int(self.usage["prompt_tokens_details"]["cached_tokens"])


@dataclass
class Stream:
    """A stream as it came: its bytes, its events without the end mark, and how many comments were between them."""

    headers: httpx.Headers
    raw: bytes = b""
    events: list[Json] = field(default_factory=list)
    comments: int = 0
    done: bool = False

    @property
    def chunks(self) -> list[Json]:
        """The events that carry an answer."""
        return [event for event in self.events if "error" not in event]

    @property
    def errors(self) -> list[Json]:
        return [event["error"] for event in self.events if "error" in event]

    @property
    def deltas(self) -> list[str]:
        """Every piece of text of the first answer, the empty one that opens it left out."""
        return [
            choice["delta"]["content"]
            for choice in self.choices(0)
            if choice["delta"].get("content") and "role" not in choice["delta"]
        ]

    def choices(self, index: int) -> list[Json]:
        return [choice for chunk in self.chunks for choice in chunk["choices"] if choice["index"] == index]

    def text(self, index: int = 0) -> str:
        return "".join(choice["delta"].get("content") or "" for choice in self.choices(index))

    def reason(self, index: int = 0) -> str | None:
        """None for an answer that an error cut off."""
        reasons = [choice["finish_reason"] for choice in self.choices(index) if choice["finish_reason"] is not None]
        return reasons[0] if reasons else None

    def stop_reason(self, index: int = 0) -> str | int | None:
        last: Json = self.choices(index)[-1]
        reason: str | int | None = last.get("stop_reason")
        return reason

    @property
    def usage(self) -> Json:
        """The counts that the last chunk tells."""
        last = self.chunks[-1]
        assert last["choices"] == [], "the stream has no chunk of token counts at its end"
        usage: Json = last["usage"]
        return usage


class Api:
    """One server and a client of it that trusts nothing. `num_bodies` counts the answers that were looked through."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.num_bodies = 0
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        self.http = httpx.Client(base_url=server.base_url, timeout=60, limits=limits, trust_env=False)

    def close(self) -> None:
        self.http.close()

    # -- any request ---------------------------------------------------------------------------------------------

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        response = self.http.request(method, path, **options)
        self._look_through(response.text)
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", response.headers["x-request-id"])
        return response

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.send("GET", path, **options)

    def post(self, body: Json | bytes, path: str = CHAT, headers: Mapping[str, str] | None = None) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", path, content=content, headers={"content-type": "application/json", **(headers or {})})

    def metric(self, name: str, labels: str = "") -> float:
        return self.server.metric(name, labels)

    def _look_through(self, body: str) -> None:
        self.num_bodies += 1
        assert "Traceback (most recent call last)" not in body
        assert not re.search(r'File "[^"]+\.py"|site-packages', body)

    # -- whole answers -------------------------------------------------------------------------------------------

    def chat(self, conversation: str | Sequence[Json], **fields: Any) -> Answer:
        """Ask greedily for at most 8 tokens unless told otherwise (None: the server's default); it must go well."""
        body = {"temperature": 0, "max_tokens": 8, **fields, "messages": messages_of(conversation)}
        return self.answer(self.post(body))

    def answer(self, response: httpx.Response) -> Answer:
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("application/json")
        answer = Answer(response.json(), response.headers)
        check_completion(answer.body)
        return answer

    def all_at_once(self, requests: Iterable[tuple[str | Sequence[Json], Json]]) -> list[Answer]:
        """`chat` for each (conversation, fields), all at the same time; answers in their order."""
        wanted = list(requests)
        with ThreadPoolExecutor(len(wanted)) as pool:
            return list(pool.map(lambda request: self.chat(request[0], **request[1]), wanted))

    # -- refusals ------------------------------------------------------------------------------------------------

    def refuses(
        self,
        body: Json | bytes,
        *,
        code: str | None,
        param: str | None,
        status: int = 400,
        path: str = CHAT,
        headers: Mapping[str, str] | None = None,
    ) -> Json:
        """Send a request that must be refused exactly so; returns the error object."""
        return check_error(self.post(body, path, headers), status=status, code=code, param=param)

    def refuses_chat(self, conversation: str | Sequence[Json], *, code: str, param: str | None, **fields: Any) -> Json:
        return self.refuses({"max_tokens": 4, **fields, "messages": messages_of(conversation)}, code=code, param=param)

    # -- streams -------------------------------------------------------------------------------------------------

    def stream(self, conversation: str | Sequence[Json], **fields: Any) -> Stream:
        """As `chat`, streamed and read to its end; the stream must be a good one."""
        stream = self.open(conversation, **fields)
        check_stream(stream)
        return stream

    def open(self, conversation: str | Sequence[Json], **fields: Any) -> Stream:
        """As `stream`, but the stream may end badly."""
        body = {"temperature": 0, "max_tokens": 8, **fields, "stream": True, "messages": messages_of(conversation)}
        with self.http.stream("POST", CHAT, json=body) as response:
            assert response.status_code == 200, response.read()
            stream = read_stream(response)
        self._look_through(stream.raw.decode("utf-8"))
        return stream


def read_stream(response: httpx.Response) -> Stream:
    """All of a stream, unless it has no end: comments would keep a client waiting for ever."""
    stream = Stream(response.headers)
    deadline = time.monotonic() + STREAM_SECONDS
    for piece in response.iter_raw():
        assert time.monotonic() < deadline, "the stream does not end"
        stream.raw += piece
    parse_events(stream)
    return stream


def parse_events(stream: Stream) -> None:
    """Split by LF LF, as the strictest client does: each block is one `data: ` line or one comment."""
    assert stream.raw.endswith(b"\n\n"), stream.raw[-200:]
    for block in stream.raw[:-2].split(b"\n\n"):
        line = block.decode("utf-8")
        # Every break that any client's line reader knows; LF and CR are among them.
        assert len(line.splitlines()) == 1, block
        if line.startswith(":"):
            stream.comments += 1
            continue
        assert not stream.done, "an event after the end mark"
        assert line.startswith("data: "), line
        payload = line.removeprefix("data: ")
        if payload == "[DONE]":
            stream.done = True
        else:
            stream.events.append(json.loads(payload))


# --- what holds for everything -------------------------------------------------------------------------------------


def check_usage(usage: Json) -> None:
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    prompt = usage["prompt_tokens_details"]
    assert prompt["text_tokens"] + prompt["image_tokens"] == usage["prompt_tokens"]
    assert 0 <= prompt["cached_tokens"] < usage["prompt_tokens"]
    assert prompt["audio_tokens"] == 0
    assert usage["completion_tokens_details"] == {
        "reasoning_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
        "audio_tokens": 0,
    }


def check_completion(body: Json) -> None:
    """The shape of a whole answer, whatever was asked."""
    assert body["object"] == "chat.completion"
    assert re.fullmatch(r"chatcmpl-[A-Za-z0-9._-]+", body["id"])
    assert isinstance(body["created"], int)
    assert isinstance(body["system_fingerprint"], str)
    assert [choice["index"] for choice in body["choices"]] == list(range(len(body["choices"])))
    for choice in body["choices"]:
        message = choice["message"]
        assert message["role"] == "assistant"
        assert message["refusal"] is None
        assert choice["finish_reason"] in REASONS
        # A null or an empty list would break clients that iterate.
        assert "tool_calls" not in message or message["tool_calls"]
        assert isinstance(message["content"], str) or "tool_calls" in message
        assert "logprobs" in choice
    check_usage(body["usage"])


def check_error(response: httpx.Response, *, status: int, code: str | None, param: str | None) -> Json:
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    assert len(response.content) < 2000
    body = response.json()
    assert set(body) == {"error"}
    error: Json = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert error["type"] == TYPES.get(status, "invalid_request_error")
    assert (error["code"], error["param"]) == (code, param), error
    return error


def check_stream(stream: Stream) -> None:
    """The order and the fields of a stream that ends well."""
    assert stream.done, stream.raw[-300:]
    assert not stream.errors, stream.errors
    assert len({(c["id"], c["created"], c["model"], c["system_fingerprint"]) for c in stream.chunks}) == 1
    assert {chunk["object"] for chunk in stream.chunks} == {"chat.completion.chunk"}
    check_choices(stream)
    empty = [position for position, chunk in enumerate(stream.chunks) if not chunk["choices"]]
    assert empty in ([], [len(stream.chunks) - 1])
    if empty:
        check_usage(stream.usage)
    headers = stream.headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", headers["x-request-id"])
    assert "content-encoding" not in headers


def check_choices(stream: Stream) -> None:
    """Each answer opens with its role, in ascending order, and ends once."""
    flat = [choice for chunk in stream.chunks for choice in chunk["choices"]]
    opened = [choice["index"] for choice in flat if "role" in choice["delta"]]
    assert opened == list(range(len(opened)))
    assert opened
    assert [choice["index"] for choice in flat[: len(opened)]] == opened
    for choice in flat[: len(opened)]:
        assert choice["delta"]["role"] == "assistant"
        assert choice["finish_reason"] is None
    finished: set[int] = set()
    for choice in flat[len(opened) :]:
        assert choice["index"] not in finished, "a chunk after the answer's end"
        assert choice["delta"].get("content") != ""
        assert "tool_calls" not in choice["delta"] or choice["delta"]["tool_calls"]
        if choice["finish_reason"] is not None:
            assert choice["finish_reason"] in REASONS
            finished.add(choice["index"])
    assert finished == set(opened)
