"""Who may ask: whatever is not open to all needs an API key, decided before anything of a request is read but its head.

The decision is made on the path's bytes as they were sent. Whatever a server, a proxy or a router makes of another
spelling (percent signs, double slashes, dots, hosts), only these exact bytes are open, so that no spelling of a guarded
path is. Pure ASGI, because anything between a stream and its socket costs once a token.
"""

from __future__ import annotations

from collections.abc import Collection

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.origin import KEY_NAME
from server.api.refusal import refuse
from server.errors import AuthenticationError, MethodNotAllowedError, ServerError
from server.keys import KeyRing

_READ = frozenset({"GET", "HEAD"})
# What load balancers and orchestrators ask, which have no key: path → methods.
OPEN = {
    b"/health": _READ,
    b"/health/live": _READ,
    b"/health/ready": _READ,
    b"/health/startup": _READ,
    b"/ping": _READ | {"POST"},
}

_POLICY_VIOLATION = 1008  # RFC 6455, section 7.4.1


class AccessMiddleware:
    """Lets requests in that are open or show a key, and leaves the name of the key in their scope.

    `pages` are paths that may be read without a key besides those that machines ask.
    """

    def __init__(self, app: ASGIApp, *, keys: KeyRing, pages: Collection[bytes] = ()) -> None:
        self._app = app
        self._keys = keys
        self._open = {**dict.fromkeys(pages, _READ), **OPEN}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":  # the server's own
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in self._open.get(scope.get("raw_path", b""), ()):
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            name = self._find(given[0]) if len(given) == 1 else None
            if name is None:
                await _refuse(scope, receive, send, shows_something=bool(given))
                return
            scope[KEY_NAME] = name
        await self._app(scope, receive, send)

    def _find(self, authorization: bytes) -> str | None:
        scheme, _, key = authorization.partition(b" ")
        return self._keys.find(key.strip(b" ")) if scheme.lower() == b"bearer" else None


async def _refuse(scope: Scope, receive: Receive, send: Send, *, shows_something: bool) -> None:
    if scope["method"] == "OPTIONS":
        # What a browser asks before it calls another site, always without a key. The same for every path.
        error: ServerError = MethodNotAllowedError("this server does not answer this method")
        await refuse(error, scope, receive, send, headers={"allow": "GET, HEAD, POST"})
        return
    if shows_something:
        error = AuthenticationError("incorrect API key provided")
    else:
        error = AuthenticationError("no API key provided: send the header 'Authorization: Bearer YOUR_KEY'")
    await refuse(error, scope, receive, send)
