"""RequestOutput → server-sent events, for every endpoint that streams. What an event says is its encoder's.

This is the API's hot path, once for every token of every stream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any, Protocol

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from server.api.disconnect import close
from server.api.errors import error_object, internal_error
from server.api.protocol import CompletionUsage, end_reason
from server.errors import RequestFailedError, ServerError
from server.types import RequestOutput, Usage

logger = logging.getLogger(__name__)

# A reader that takes nothing for so long is gone, whatever its socket says.
SEND_TIMEOUT_SECONDS = 60.0

EVENT = b"data: "
END = b"\n\n"
DONE = b"data: [DONE]\n\n"

# JSON lets these stand unescaped, but clients that split text into lines break an event there.
_LINE_BREAKS = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085"))

_to_json = msgspec.json.Encoder().encode


class EventEncoder(Protocol):
    """Writes the events of one response. Each method gives whole events, or no bytes."""

    num_choices: int

    def opening(self, first: RequestOutput) -> bytes:
        """What stands before all else, once the first output is there. Its text is not written here."""

    def content(self, output: RequestOutput) -> bytes:
        """An output that does not end its choice."""

    def finish(self, output: RequestOutput, reason: str) -> bytes:
        """The last output of a choice; `reason` is "stop" or "length"."""

    def end(self, usage: Usage) -> bytes:
        """What stands after all else, when every choice has ended."""

    def failure(self, error: ServerError) -> bytes:
        """What ends a response that cannot go on."""


def encode_error(error: ServerError) -> bytes:
    """What ends a stream that cannot go on: clients raise it, and the missing finish_reason says the same again."""
    return EVENT + encode(error_object(error)) + END + DONE


class OpenStream:
    """Outputs of which the first is being waited for.

    As long as nothing is sent, an error can still be an HTTP status; but a client that hears nothing for too long, or a
    proxy before it, goes away. So the first output is waited for as long as any other silence may last, and no longer.
    """

    def __init__(self, outputs: AsyncIterator[RequestOutput]) -> None:
        self.rest = outputs
        self.first: asyncio.Task[RequestOutput] = asyncio.ensure_future(anext(outputs))

    @classmethod
    async def begin(cls, outputs: AsyncIterator[RequestOutput], seconds: float) -> OpenStream:
        """Wait at most so long for the first output. Raises what went wrong until then."""
        opened = cls(outputs)
        try:
            await asyncio.wait((opened.first,), timeout=seconds)
        except asyncio.CancelledError:
            await opened.close()
            raise
        if opened.first.done():
            try:
                opened.first.result()
            except StopAsyncIteration:
                raise RequestFailedError("the answer ended before it began") from None
        return opened

    async def close(self) -> None:
        self.first.cancel()
        await asyncio.gather(self.first, return_exceptions=True)
        await close(self.rest)


async def stream_events(opened: OpenStream, encoder: EventEncoder) -> AsyncIterator[bytes]:
    """All events of one response, one item for each write. Errors become the last event: the status has been sent."""
    num_open = encoder.num_choices
    rest = opened.rest
    try:
        first = await opened.first
        reason = end_reason(first)
        events = encoder.opening(first) + (encoder.content(first) if reason is None else encoder.finish(first, reason))
        num_open -= reason is not None
        if not num_open:
            yield events + encoder.end(first.usage)
            return
        yield events
        async for output in rest:
            reason = end_reason(output)
            if reason is None:
                events = encoder.content(output)
            else:
                events = encoder.finish(output, reason)
                num_open -= 1
                if not num_open:
                    yield events + encoder.end(output.usage)
                    return
            if events:
                yield events
        raise RequestFailedError("the answer ended without a reason")
    except ServerError as error:
        logger.warning("stream ended by %s: %s", error.code, error.message)
        yield encoder.failure(error)
    except Exception:  # a stream that just stops looks like a network fault, and the client would wait or try again
        logger.exception("stream ended by an unexpected error")
        yield encoder.failure(internal_error())


class EventStreamResponse(EventSourceResponse):
    """Sends the events, a comment whenever `keep_alive_seconds` have passed, and closes `rest` however it ends."""

    def __init__(
        self,
        opened: OpenStream,
        *,
        encoder: EventEncoder,
        keep_alive_seconds: float,
    ) -> None:
        super().__init__(
            stream_events(opened, encoder),
            headers={"cache-control": "no-cache"},
            ping=keep_alive_seconds,
            sep="\n",
            ping_message_factory=_keep_alive,
        )
        self._opened = opened
        self._watch = _SendWatch(SEND_TIMEOUT_SECONDS)

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        """The library makes a cancel scope for each event, a sixth of what a token costs; one watch does for all."""
        await self._watch.send(send, message)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._watch:
                await super().__call__(scope, receive, send)
        except TimeoutError:
            logger.warning("a client has not read its stream for %g s and is taken for gone", SEND_TIMEOUT_SECONDS)
            raise ClientDisconnect from None
        finally:
            # The events' own generator may never have been started, and then its `finally` would not run.
            await self._opened.close()


class _SendWatch:
    """Ends the block that it guards with TimeoutError when one send takes longer than `seconds`."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: float | None = None  # when the oldest send that is under way began
        self._deadline = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> None:
        await self._deadline.__aenter__()
        self._loop = asyncio.get_running_loop()
        self._look()

    async def __aexit__(self, *failure: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()
        await self._deadline.__aexit__(*failure)

    async def send(self, send: Send, message: Message) -> None:
        if self._since is not None:  # a keep-alive behind an event that waits
            await send(message)
            return
        self._since = self._loop.time()
        try:
            await send(message)
        finally:
            self._since = None

    def _look(self) -> None:
        now = self._loop.time()
        if self._since is not None and now - self._since >= self._seconds:
            self._deadline.reschedule(now)
        else:
            self._timer = self._loop.call_later(self._seconds / 4, self._look)


def _keep_alive() -> ServerSentEvent:
    return ServerSentEvent(comment="keep-alive", sep="\n")


def encode(value: Any) -> bytes:
    """JSON in UTF-8 in which nothing looks like the end of a line."""
    encoded = _to_json(value)
    if not encoded.isascii():
        for raw, escaped in _LINE_BREAKS:
            encoded = encoded.replace(raw, escaped)
    return encoded


def encode_usage(usage: Usage) -> bytes:
    return CompletionUsage.from_usage(usage).model_dump_json().encode()
