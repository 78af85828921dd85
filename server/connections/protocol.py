"""HTTP/1.1 on one connection: uvicorn's protocol, within limits of time and size, and with errors in OpenAI's shape.

uvicorn waits for ever for the rest of a head and for a reader of an answer, keeps heads of any length, answers what is
no HTTP in plain text, adds what follows a body to the headers of its request, and takes the body of a request that asks
for another protocol for the next request.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from server.api.refusal import LINGER_SECONDS
from server.connections.answers import raw_answer
from server.connections.readers import ReaderWatch
from server.errors import ClientError, DeadlineError, HeadersTooLargeError, ServerError
from server.observability.logs import bind_request_id

if TYPE_CHECKING:
    from server.observability.metrics import ServerMetrics

access_logger = logging.getLogger("server.access")

MAX_HEAD_BYTES = 16 << 10
MAX_HEADERS = 64
MAX_PIPELINED = 16  # requests that were sent before those ahead of them were answered


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Seconds for the head of a request, and for what is left of a body whose request is answered already."""

    head: float
    body: float


class HttpConnection(HttpToolsProtocol):
    """Requests on one connection, one after the other; those sent ahead of their turn wait.

    One timer runs at a time, for whatever the client owes: a head, the rest of a body, the next request, or to close.
    While a request is being answered it owes nothing here: how long its body may take is the application's to say.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        *,
        patience: Patience,
        metrics: ServerMetrics,
        on_lost: Callable[[], None],
        is_leaving: Callable[[], bool],
    ) -> None:
        super().__init__(config, server_state, app_state)
        self.is_made = False
        self._patience = patience
        self._metrics = metrics
        self._on_lost = on_lost
        self._is_leaving = is_leaving
        self._turn: RequestResponseCycle | None = None  # the request that is or was being answered
        self._in_head = False  # its first byte is here, its last is not
        self._in_body = False
        self._head_bytes = 0  # of the parts of a head that the parser has given out
        self._num_headers = 0
        self._silent_bytes = 0  # that the parser keeps to itself, or has thrown away
        self._declined_upgrade = False
        self._refusal: ServerError | None = None
        self._is_ending = False
        self._debt = ""
        self._debt_since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._reader: ReaderWatch  # from the transport on

    # -- the transport's calls -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.is_made = True
        super().connection_made(transport)
        self._reader = ReaderWatch(transport, self.loop)
        self._answers = _Answers(transport, self._close_with_care)
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._reader.stop()
        super().connection_lost(exc)
        self._tell_disconnect()
        self._unset_keepalive_if_required()
        self._on_lost()

    def eof_received(self) -> None:
        self._reader.start()  # the transport closes now, once all is read

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None or self._is_ending:
            return  # to read on and not to listen: closing on unread bytes would destroy the answer
        self._silent_bytes += len(data)
        try:
            self._feed(data)
            if self._silent_bytes > MAX_HEAD_BYTES:
                raise _too_large()
        except httptools.HttpParserError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, ServerError) else _not_http())
        except ServerError as error:
            self._refuse(error)
        self._set_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reader.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._reader.stop()

    # -- the parser's calls; what they raise is the parser's error's context ---------------------------------------

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = self._num_headers = 0

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        if self._num_headers > MAX_HEADERS:
            raise HeadersTooLargeError(f"the request has more header fields than the limit of {MAX_HEADERS}")
        self._count_head(len(name) + len(value) + len(": \r\n"))
        if self._in_head:  # and not after the body, where proxies do not look
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise _not_http()
            self._declined_upgrade = True
            return
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ClientError(
                f"more than {MAX_PIPELINED} requests wait on this connection for their turn", code="too_many_requests"
            )
        self._count_head(len(self.parser.get_method()) + len("  HTTP/1.1\r\n") + len("\r\n"))
        self._silent_bytes = 0
        super().on_headers_complete()
        self._in_head, self._in_body = False, True

    def on_body(self, body: bytes) -> None:
        self._silent_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._declined_upgrade:
            return
        self._silent_bytes = 0
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()
        is_over = self._is_ending or self.transport.is_closing()
        if self._refusal is not None and not self._is_answering and not is_over:
            self._answer(self._refusal)
        self._set_timer()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._turn = cycle
        cycle.transport = self._answers  # type: ignore[assignment]
        if self._is_leaving():
            # Clients that keep a connection would keep coming here where balancers spread connections, not requests.
            cycle.keep_alive = False
        super()._start_asgi_task(cycle, app)

    def _tell_disconnect(self) -> None:
        """uvicorn tells the last request that has come, which may be waiting behind the one that is answered."""
        if self._turn is not None and not self._turn.response_complete:
            self._turn.disconnected = True
            self._turn.message_event.set()

    # -- reading -------------------------------------------------------------------------------------------------

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._declined_upgrade = False
            self._feed_as_if_not_asked(data[upgrade.args[0] :])

    def _feed_as_if_not_asked(self, rest: bytes) -> None:
        """Go on with a head that wanted to switch protocols, which no server has to do.

        The parser takes its body for that other protocol. So a new one gets the head again, without the wish.
        """
        lines = [self.parser.get_method() + b" " + self.url + f" HTTP/{self.parser.get_http_version()}".encode()]
        for name, value in self.headers:
            if name == b"connection":
                value = b", ".join(word for word in value.split(b",") if word.strip().lower() != b"upgrade")
            if name != b"upgrade":
                lines.append(name + b": " + value)
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))
        self._feed(rest)

    def _count_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            raise _too_large()

    # -- refusing ------------------------------------------------------------------------------------------------

    def _refuse(self, error: ServerError) -> None:
        """Read no further request, and say why once all that came before has been answered."""
        self._refusal = error
        if self._in_body:
            self._break_off(error)
        elif not self._is_answering:
            self._answer(error)

    def _break_off(self, error: ServerError) -> None:
        """What is wrong is the body of the last request that has begun."""
        if self.pipeline:
            self.pipeline.popleft()  # it has not had its turn; those before it go on
            return
        self._tell_disconnect()
        if self.cycle.response_started:
            self._end()
        else:
            self._answer(error)

    def _answer(self, error: ServerError) -> None:
        request_id = f"req_{uuid.uuid4().hex}"
        headers = [*self.server_state.default_headers, (b"x-request-id", request_id.encode())]
        self.transport.write(raw_answer(error, headers))
        self._end()
        if not self._in_body:  # else the application counts a client that left
            seconds = self.loop.time() - self._debt_since
            self._metrics.record_http(handler="other", method="other", status=error.status, seconds=seconds)
        with bind_request_id(request_id):
            access_logger.info("no request: %d %s", error.status, error.code)

    def _close_with_care(self) -> None:
        """After an answer that is the last on this connection."""
        if self._in_body:
            self.pipeline.clear()
            self._end()
        else:
            self.transport.close()

    def _end(self) -> None:
        """Say that nothing more will come, and give the client a while to read and to leave."""
        self._is_ending = True
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()
        self._reader.start()

    # -- time ----------------------------------------------------------------------------------------------------

    @property
    def _is_answering(self) -> bool:
        return self._turn is not None and not self._turn.response_complete

    def _owed(self) -> tuple[str, float]:
        """What the client is waited for, and for how many seconds."""
        if self._is_ending:
            return "close", LINGER_SECONDS
        if self._is_answering:
            return "", 0.0
        if self._in_body:
            return "body", self._patience.body
        if self.cycle is None or self._in_head or self._silent_bytes:
            return "head", self._patience.head
        return "request", self.timeout_keep_alive

    def _set_timer(self) -> None:
        """Start the time of what is owed; if it is the same as before, its time goes on."""
        debt, seconds = self._owed()
        if debt == self._debt:
            return
        self._debt, self._debt_since = debt, self.loop.time()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._on_late) if debt else None

    def _on_late(self) -> None:
        if self._debt == "head":
            seconds = self._patience.head
            self._refuse(DeadlineError(f"the head of the request did not arrive within {seconds:g} seconds"))
            self._set_timer()
        elif self._debt == "request":
            self.transport.close()
            self._reader.start()
        else:
            self.transport.abort()


class _Answers:
    """Where uvicorn writes answers: a transport that is closed with care."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = close


def _not_http() -> ClientError:
    return ClientError("this is no valid HTTP/1.1 request", code="invalid_http")


def _too_large() -> HeadersTooLargeError:
    return HeadersTooLargeError(f"the header fields of the request exceed the limit of {MAX_HEAD_BYTES} bytes")
