"""RequestOutput → server-sent events, for every endpoint that streams; and the chunks of a plain chat answer.

This is the API's hot path, once for every token of every stream: what is constant in a chunk is encoded once a
stream, and a token costs one JSON string and one concatenation. Answers with more than text are `chat_chunks.py`'s.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any, Protocol

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from server.api.disconnect import close
from server.api.errors import error_object, internal_error
from server.api.protocol import CompletionUsage, StreamOptions, finish_reason_name
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


class ChunkEncoder:
    """Writes the chunks of a chat answer of text. `head` holds what all share: id, object, created, model."""

    def __init__(self, head: dict[str, Any], options: StreamOptions, *, num_choices: int = 1) -> None:
        self.num_choices = num_choices
        self._usage_at_end = options.include_usage
        self._usage_always = options.include_usage and options.continuous_usage_stats
        self._usage_null = b',"usage":null' if options.include_usage else b""
        # Open at the end: the choices follow.
        self._head = EVENT + msgspec.json.encode(head)[:-1] + b',"choices":['
        self._content_starts = [self._head + b'{"index":%d,"delta":{"content":' % index for index in range(num_choices)]
        self._content_end = b'},"logprobs":null,"finish_reason":null}]' + self._usage_null + b"}" + END

    def opening(self, first: RequestOutput) -> bytes:
        """One chunk for each choice, in order: clients count them."""
        delta = b'"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        before_first_token = msgspec.structs.replace(first.usage, completion_tokens=0)
        rest = delta + self._usage(before_first_token) + b"}" + END
        return b"".join(self._head + b'{"index":%d,' % index + rest for index in range(self.num_choices))

    def content(self, output: RequestOutput) -> bytes:
        """No bytes for an output without text: an empty delta is a token to a benchmark."""
        if not output.text:
            return b""
        if self._usage_always:
            delta = encode(output.text) + b'},"logprobs":null,"finish_reason":null}]'
            return self._content_starts[output.index] + delta + self._usage(output.usage) + b"}" + END
        return self._content_starts[output.index] + encode(output.text) + self._content_end

    def finish(self, output: RequestOutput, reason: str) -> bytes:
        """`stop_reason` is told only where there is one, so that an ordinary stream is OpenAI's to the byte."""
        delta = b'{"content":' + encode(output.text) + b"}" if output.text else b"{}"
        stop = b"" if output.stop_reason is None else b',"stop_reason":' + encode(output.stop_reason)
        choice = b'{"index":%d,"delta":%b,"logprobs":null,"finish_reason":"%b"%b}]' % (
            *(output.index, delta, reason.encode(), stop),
        )
        return self._head + choice + self._usage(output.usage) + b"}" + END

    def end(self, usage: Usage) -> bytes:
        if not self._usage_at_end:
            return DONE
        return self._head + b'],"usage":' + encode_usage(usage) + b"}" + END + DONE

    def _usage(self, usage: Usage) -> bytes:
        return b',"usage":' + encode_usage(usage) if self._usage_always else self._usage_null


def encode_error(error: ServerError) -> bytes:
    """What ends a stream that cannot go on: clients raise it, and the missing finish_reason says the same again."""
    return EVENT + encode(error_object(error)) + END + DONE


async def chat_events(
    first: RequestOutput, rest: AsyncIterator[RequestOutput], encoder: EventEncoder
) -> AsyncIterator[bytes]:
    """All events of one response, one item for each write. Errors become the last event: the status has been sent."""
    num_open = encoder.num_choices
    try:
        reason = _finish_reason(first)
        events = encoder.opening(first) + (encoder.content(first) if reason is None else encoder.finish(first, reason))
        num_open -= reason is not None
        if not num_open:
            yield events + encoder.end(first.usage)
            return
        yield events
        async for output in rest:
            reason = _finish_reason(output)
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
        yield encode_error(error)
    except Exception:
        logger.exception("stream ended by an unexpected error")
        yield encode_error(internal_error())


class ChatEventResponse(EventSourceResponse):
    """Sends the events, a comment whenever `keep_alive_seconds` have passed, and closes `rest` however it ends."""

    def __init__(
        self,
        first: RequestOutput,
        rest: AsyncIterator[RequestOutput],
        *,
        encoder: EventEncoder,
        keep_alive_seconds: float,
    ) -> None:
        super().__init__(
            chat_events(first, rest, encoder),
            headers={"cache-control": "no-cache"},
            ping=keep_alive_seconds,
            sep="\n",
            ping_message_factory=_keep_alive,
            send_timeout=SEND_TIMEOUT_SECONDS,
        )
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            logger.warning("a client has not read its stream for %g s and is taken for gone", SEND_TIMEOUT_SECONDS)
            raise ClientDisconnect from None
        finally:
            # The events' own generator may never have been started, and then its `finally` would not run.
            await close(self._rest)


def _keep_alive() -> ServerSentEvent:
    return ServerSentEvent(comment="keep-alive", sep="\n")


def _finish_reason(output: RequestOutput) -> str | None:
    if output.finish_reason is None:
        return None
    reason = finish_reason_name(output.finish_reason)
    if reason is None:
        raise RequestFailedError("the request was ended by the server")
    return reason


def encode(value: Any) -> bytes:
    """JSON in UTF-8 in which nothing looks like the end of a line."""
    encoded = _to_json(value)
    if not encoded.isascii():
        for raw, escaped in _LINE_BREAKS:
            encoded = encoded.replace(raw, escaped)
    return encoded


def encode_usage(usage: Usage) -> bytes:
    return CompletionUsage.from_usage(usage).model_dump_json().encode()
