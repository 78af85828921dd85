"""Sends one line's request until there is an answer worth keeping.

Knows HTTP and when to try again. Does not know files; what is behind the client is the target's business: a server
somewhere, or the application in this very process.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from server.batch.output import RunStopped

BUSY = (429, 503)
UNAUTHORIZED = 401
FIRST_PAUSE = 0.5
MAX_PAUSE = 30.0  # of our own choice
MAX_RETRY_AFTER = 120.0  # of the server's choice


class Abandoned(Exception):  # noqa: N818 - nothing is wrong
    """The run is ending, and the line was not being computed."""


class LineFailed(Exception):  # noqa: N818 - becomes an error line
    """There is no answer that could be kept; other lines may fare better."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True)
class Answer:
    """`body` is a JSON object on one line. `request_id` is the server's, None if it names none."""

    status: int
    request_id: str | None
    body: bytes
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True, slots=True)
class Target:
    """Who answers. `urls` are the paths it has, None where that is not known; `is_dead` says that it never will."""

    client: httpx.AsyncClient
    urls: frozenset[str] | None = None
    is_dead: Callable[[], bool] = lambda: False


@dataclass(frozen=True, slots=True)
class Patience:
    """`retries` after a failed connection; `max_wait` seconds in all for answers of 429 and 503."""

    retries: int = 4
    max_wait: float = 600.0


class Sender:
    """Sends for whoever calls, at once. `stopping` ends waits between tries, not what is being answered."""

    def __init__(self, target: Target, patience: Patience, stopping: asyncio.Event) -> None:
        self._target = target
        self._patience = patience
        self._stopping = stopping

    async def send(self, url: str, body: bytes) -> Answer:
        """The last answer, of whatever status. Raises LineFailed, Abandoned, or RunStopped when none can get one."""
        failures = 0
        waited = 0.0
        pause = FIRST_PAUSE
        while True:
            if self._stopping.is_set():
                raise Abandoned
            try:
                response = await self._target.client.post(url, content=body)
            except httpx.RequestError as error:
                failures += 1
                if failures > self._patience.retries:
                    await self._blame(error, failures)
                await self._pause(pause)
            else:
                if self._is_final(response, waited):
                    return read_answer(response)
                wait = retry_after(response.headers.get("retry-after")) or pause
                waited += wait
                await self._pause(wait)
            pause = min(2 * pause, MAX_PAUSE)

    def _is_final(self, response: httpx.Response, waited: float) -> bool:
        if response.status_code == UNAUTHORIZED:
            raise RunStopped("the server refuses the key (401)")
        if response.status_code not in BUSY:
            return True
        if self._target.is_dead():
            raise RunStopped("the engine is not running any more")
        return waited >= self._patience.max_wait

    async def _blame(self, error: httpx.RequestError, attempts: int) -> None:
        """A server that answers somebody else makes it this line's fault; one that does not is gone for all."""
        reason = str(error) or type(error).__name__
        try:
            await self._target.client.get("/v1/models")
        except httpx.RequestError:
            raise RunStopped(f"the server cannot be reached: {reason}") from None
        raise LineFailed("connection_error", f"no answer in {attempts} attempts: {reason}") from None

    async def _pause(self, seconds: float) -> None:
        """Wait, a little longer than asked and not as long as the next one; Abandoned if the run ends meanwhile."""
        try:
            async with asyncio.timeout(seconds * (1 + random.random() / 8)):
                await self._stopping.wait()
        except TimeoutError:
            return
        raise Abandoned


def retry_after(header: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, at most MAX_RETRY_AFTER; None without one that is a number above 0."""
    try:
        seconds = float(header or "")
    except ValueError:
        return None
    return min(seconds, MAX_RETRY_AFTER) if math.isfinite(seconds) and seconds > 0 else None


class _Body(msgspec.Struct):
    usage: Any = None


def read_answer(response: httpx.Response) -> Answer:
    """What is kept of an answer. Raises LineFailed if its body is not a JSON object."""
    content = response.content
    try:
        content.decode()
        usage = msgspec.json.decode(content, type=_Body).usage
        body = msgspec.json.format(content, indent=-1)  # changes nothing but the space around tokens
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        message = f"the server answered {response.status_code} with a body that is not a JSON object"
        raise LineFailed("invalid_response", message) from None
    return Answer(
        status=response.status_code,
        request_id=response.headers.get("x-request-id"),
        body=body,
        tokens_in=_count(usage, "prompt_tokens", "input_tokens"),
        tokens_out=_count(usage, "completion_tokens", "output_tokens"),
    )


def _count(usage: Any, *names: str) -> int:
    """Chat and completions say prompt and completion, responses say input and output."""
    found = [usage[name] for name in names if name in usage] if isinstance(usage, dict) else []
    return found[0] if found and isinstance(found[0], int) else 0
