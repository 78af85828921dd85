"""The server that is talked to: which models it has, and an answer as it arrives. All HTTP of the chat is here."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx

from server.chat.errors import ChatError
from server.chat.events import Answer, EventParser, error_message

CONNECT_SECONDS = 10.0
MAX_ERROR_BYTES = 64 << 10
LOOPBACK = ("localhost", "127.0.0.1", "::1")

_KEY_HINT = "give a key with --api-key-file, --api-key or the environment's OPENAI_API_KEY"


class Endpoint:
    """An OpenAI-compatible server. Use as a context manager."""

    def __init__(self, base_url: str, *, api_key: str | None = None, timeout: float = 600.0) -> None:
        """`base_url` is http(s), with or without the closing `/v1`; `timeout` is the longest silence in seconds."""
        self.root = base_url.rstrip("/").removesuffix("/v1")
        host = urlsplit(self.root).hostname
        self._is_local = host in LOOPBACK
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout, connect=CONNECT_SECONDS),
            trust_env=not self._is_local,  # the environment's proxy does not know this machine by that name
        )

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def models(self) -> list[str]:
        """The ids of the models that it lists, in its order. Raises ChatError."""
        with self._told(), self._client.stream("GET", f"{self.root}/v1/models") as response:
            _check(response)
            response.read()
            try:
                return [str(model["id"]) for model in response.json()["data"]]
            except (ValueError, KeyError, TypeError):
                raise ChatError(f"{self.root}/v1/models is not a list of models") from None

    def ask(self, body: dict[str, Any], answer: Answer) -> Generator[str, None, None]:
        """The answer's text as it arrives, kept in `answer` too. Close the iterator to stop the answer.

        Raises ChatError, also for an answer that ends before the server has said that it is whole.
        """
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        parser = EventParser()
        with self._told(answer), self._open(body) as response:
            for chunk in response.iter_bytes():
                now = time.perf_counter()
                for data in parser.feed(chunk):
                    text = answer.take(data, now)
                    if text:
                        yield text
                    if answer.is_done:
                        return
        if not answer.is_whole:
            raise ChatError("the answer was cut off: the server closed the connection before its end")

    @contextmanager
    def _open(self, body: dict[str, Any]) -> Iterator[httpx.Response]:
        request = self._client.build_request(
            "POST",
            f"{self.root}/v1/chat/completions",
            content=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Accept": "text/event-stream"},
        )
        response = self._client.send(request, stream=True)
        try:
            _check(response)
            kind = response.headers.get("content-type", "")
            if not kind.lower().startswith("text/event-stream"):
                raise ChatError(
                    f"the server answered {kind or 'without a type'} where a stream of events was asked for"
                )
            yield response
        finally:
            response.close()

    @contextmanager
    def _told(self, answer: Answer | None = None) -> Iterator[None]:
        """Failures of the connection as ChatErrors. Behind a whole answer they are of no account."""
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            if answer is None or not answer.is_whole:
                raise ChatError(self._failure(error)) from None

    def _failure(self, error: Exception) -> str:
        if _is_refused(error):
            message = f"nothing listens at {self.root} (connection refused)"
            return f"{message}; start a server there: {self._how_to_start()}" if self._is_local else message
        if isinstance(error, httpx.ConnectTimeout):
            return f"{self.root} did not accept a connection within {CONNECT_SECONDS:g} s"
        if isinstance(error, httpx.TimeoutException):
            return f"{self.root} was silent for longer than --timeout"
        if isinstance(error, httpx.RemoteProtocolError):
            return "the answer was cut off: the server closed the connection before its end"
        return f"{self.root}: {error_message(str(error) or type(error).__name__)}"

    def _how_to_start(self) -> str:
        port = urlsplit(self.root).port or 80
        return f"idefics2-server serve --port {port}, or make serve PORT={port}"


def _is_refused(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _check(response: httpx.Response) -> None:
    """Raises ChatError unless the status is 200, with the server's own message and what can be done."""
    if response.status_code == 200:
        return
    message = f"HTTP {response.status_code}: {_own_message(response)}"
    retry_after = response.headers.get("retry-after", "").strip()
    if response.status_code == 401:
        message += f"\n{_KEY_HINT}"
    elif response.status_code in (429, 503) and retry_after:
        when = f"in {retry_after} s" if retry_after.isdecimal() else f"at {error_message(retry_after)}"
        message += f"\nthe server asks to try again {when} (Retry-After)"
    raise ChatError(message)


def _own_message(response: httpx.Response) -> str:
    body = bytearray()
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > MAX_ERROR_BYTES:
            break
    text = bytes(body).decode("utf-8", "replace")
    try:
        return error_message(json.loads(text))
    except ValueError:
        return error_message(text) or response.reason_phrase or "no message"
