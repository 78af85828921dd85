"""What happens to every request, whatever its path: an id, a limit, a line in the log, a count.

Pure ASGI, because anything between a stream and its socket costs once a token.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import error_response, internal_error
from server.api.origin import KEY_NAME
from server.api.refusal import refuse
from server.errors import DeadlineError, TooLargeError
from server.observability.logs import bind_request_id

if TYPE_CHECKING:
    from server.observability.metrics import ServerMetrics

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("server.access")

# Not sent by any server: the client left before the answer was complete.
CLIENT_CLOSED_REQUEST = 499

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_QUIET_PATHS = ("/health", "/ping", "/load", "/metrics")


class RequestMiddleware:
    """The outermost layer: names the request, answers what nobody else has caught, logs and counts it."""

    def __init__(self, app: ASGIApp, *, metrics: ServerMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        exchange = _Exchange(receive, send, request_id)
        with bind_request_id(request_id):
            try:
                await self._app(scope, exchange.receive, exchange.send)
            except ClientDisconnect:
                exchange.disconnected = True
            except Exception:
                logger.exception("unhandled error")
                # After the start there is no honest way to end the answer but to break the connection.
                if not exchange.status:
                    await error_response(internal_error())(scope, exchange.receive, exchange.send)
            finally:
                self._record(scope, exchange)

    def _record(self, scope: Scope, exchange: _Exchange) -> None:
        seconds = time.perf_counter() - exchange.started
        # An error is told in one piece, so that whoever leaves behind it has had it.
        has_left = exchange.disconnected and exchange.status < 400
        status = CLIENT_CLOSED_REQUEST if has_left else exchange.status or 500
        key = scope.get(KEY_NAME, "")
        # The route's template and known methods only: a client must not be able to make new time series.
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._metrics.record_http(handler=route, method=method, status=status, seconds=seconds, key=key)
        level = logging.DEBUG if scope["path"].startswith(_QUIET_PATHS) and status < 400 else logging.INFO
        # The raw path is percent-encoded, so nothing in it can end the line.
        path = scope.get("raw_path", b"").decode("ascii", "replace")[:200]
        asked_by = f" by {key}" if key else ""
        fields = {"method": method, "path": path, "status": status, "seconds": round(seconds, 4), "key": key or None}
        access_logger.log(
            level, "%s %s %d %.0fms%s", method, path, status, seconds * 1000, asked_by, extra={"fields": fields}
        )


class _Exchange:
    """One request and its answer, seen from outside."""

    def __init__(self, receive: Receive, send: Send, request_id: str) -> None:
        self._receive = receive
        self._send = send
        self._request_id = request_id
        self._complete = False
        self.started = time.perf_counter()
        self.status = 0
        self.disconnected = False

    async def receive(self) -> Message:
        message = await self._receive()
        # After a complete answer servers say "disconnect" too, and mean nothing by it.
        if message["type"] == "http.disconnect" and not self._complete:
            self.disconnected = True
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            milliseconds = int((time.perf_counter() - self.started) * 1000)
            message["headers"] = [
                *message.get("headers", ()),
                (b"x-request-id", self._request_id.encode()),
                (b"openai-processing-ms", b"%d" % milliseconds),
                (b"openai-version", b"2020-10-01"),
            ]
        elif not message.get("more_body", False):
            self._complete = True
        await self._send(message)


class BodyLimitMiddleware:
    """Refuses bodies over `max_bytes`, by their Content-Length or, where that is missing, while they are read; and
    those that take longer than `seconds` from the first read to their end.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self._max_bytes:
            await refuse(self._too_large(), scope, receive, send)
            return
        body = _LimitedBody(receive, self._max_bytes, self._seconds)
        try:
            await self._app(scope, body.receive, send)
        except _BodyTooLarge:
            await refuse(self._too_large(), scope, receive, send)
        except _BodyTooSlow:
            error = DeadlineError(f"the body of the request did not arrive within {self._seconds:g} seconds")
            await refuse(error, scope, receive, send)

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"the body is larger than the limit of {self._max_bytes / (1 << 20):g} MiB")


class _LimitedBody:
    """What is received of one request."""

    def __init__(self, receive: Receive, max_bytes: int, seconds: float) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._num_bytes = 0
        self._deadline = 0.0
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:  # then it is a disconnect that is waited for, and that has no limit
            return await self._receive()
        if not self._deadline:
            self._deadline = asyncio.get_running_loop().time() + self._seconds
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise _BodyTooSlow from None
        self._complete = not message.get("more_body", False)
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > self._max_bytes:
            raise _BodyTooLarge
        return message


# Not ServerErrors: those are answered further in, where the connection cannot be closed with care.


class _BodyTooLarge(Exception):  # noqa: N818 - never leaves this module
    pass


class _BodyTooSlow(Exception):  # noqa: N818 - never leaves this module
    pass


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
