"""RequestOutput → chat.completion.chunk → server-sent events.

This is the API's hot path, once for every token of every stream: what is constant in a chunk is encoded once a
stream, and a token costs one JSON string and one concatenation.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

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

_EVENT = b"data: "
_END = b"\n\n"
_DONE = b"data: [DONE]\n\n"

# JSON lets these stand unescaped, but clients that split text into lines break an event there.
_LINE_BREAKS = ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085"))


class ChunkEncoder:
    """Writes the events of one stream. `head` holds what all its chunks share: id, object, created, model."""

    def __init__(self, head: dict[str, Any], options: StreamOptions) -> None:
        self._usage_at_end = options.include_usage
        self._usage_always = options.include_usage and options.continuous_usage_stats
        self._usage_null = b',"usage":null' if options.include_usage else b""
        # Open at the end: the choices follow.
        self._head = _EVENT + msgspec.json.encode(head)[:-1] + b',"choices":['
        self._content_start = self._head + b'{"index":0,"delta":{"content":'
        self._content_end = b'},"logprobs":null,"finish_reason":null}]' + self._usage_null + b"}" + _END

    def role(self, usage: Usage) -> bytes:
        """The chunk that opens the answer, before any of its text."""
        delta = b'{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        before_first_token = msgspec.structs.replace(usage, completion_tokens=0)
        return self._head + delta + self._usage(before_first_token) + b"}" + _END

    def content(self, output: RequestOutput) -> bytes:
        """An output that ends nothing. No bytes for one without text: an empty delta is a token to a benchmark."""
        if not output.text:
            return b""
        if self._usage_always:
            delta = _encode(output.text) + b'},"logprobs":null,"finish_reason":null}]'
            return self._content_start + delta + self._usage(output.usage) + b"}" + _END
        return self._content_start + _encode(output.text) + self._content_end

    def finish(self, output: RequestOutput, reason: str) -> bytes:
        """The last output's text and why it was the last, then the token counts if they were asked for, then the end.

        `stop_reason` is told only where there is one, so that an ordinary stream is OpenAI's to the byte.
        """
        delta = b'{"content":' + _encode(output.text) + b"}" if output.text else b"{}"
        stop = b"" if output.stop_reason is None else b',"stop_reason":' + _encode(output.stop_reason)
        choice = b'{"index":0,"delta":%b,"logprobs":null,"finish_reason":"%b"%b}]' % (delta, reason.encode(), stop)
        last = self._head + choice + self._usage(output.usage) + b"}" + _END
        if not self._usage_at_end:
            return last + _DONE
        return last + self._head + b'],"usage":' + _encode_usage(output.usage) + b"}" + _END + _DONE

    def _usage(self, usage: Usage) -> bytes:
        return b',"usage":' + _encode_usage(usage) if self._usage_always else self._usage_null


def encode_error(error: ServerError) -> bytes:
    """What ends a stream that cannot go on: clients raise it, and the missing finish_reason says the same again."""
    return _EVENT + _encode(error_object(error)) + _END + _DONE


async def chat_events(
    first: RequestOutput, rest: AsyncIterator[RequestOutput], encoder: ChunkEncoder
) -> AsyncIterator[bytes]:
    """All events of one answer. Errors become the last event, since the status has been sent."""
    try:
        reason = _finish_reason(first)
        opening = encoder.role(first.usage)
        if reason is not None:
            yield opening + encoder.finish(first, reason)
            return
        yield opening + encoder.content(first)
        async for output in rest:
            reason = _finish_reason(output)
            if reason is not None:
                yield encoder.finish(output, reason)
                return
            event = encoder.content(output)
            if event:
                yield event
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
        encoder: ChunkEncoder,
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


def _encode(value: Any) -> bytes:
    """JSON in UTF-8 in which nothing looks like the end of a line."""
    encoded = msgspec.json.encode(value)
    if not encoded.isascii():
        for raw, escaped in _LINE_BREAKS:
            encoded = encoded.replace(raw, escaped)
    return encoded


def _encode_usage(usage: Usage) -> bytes:
    return CompletionUsage.from_usage(usage).model_dump_json().encode()
