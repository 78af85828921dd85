"""Which names this server answers to: a page from elsewhere that has its own name point here is none of them.

What is refused is the name in the Host header, which is all that a browser says of where it believes to be. Nothing in
the server uses that name, so without a list any will do, as long as there is exactly one (RFC 9112, section 3.2).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.access import OPEN
from server.api.refusal import refuse
from server.errors import ClientError, ConfigError

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{0,5})?")
_PATTERN = re.compile(r"(\*\.)?[a-z0-9._-]+|\[[0-9a-f:.]+\]")


class HostNames:
    """Host names that are allowed, with any port; all of them if none is given.

    `*.example.com` allows all names below example.com, and not itself.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Raises ConfigError for what cannot be a host."""
        canonical = [_canonical(name) for name in names]
        self._names = frozenset(name for name in canonical if not name.startswith("*"))
        self._suffixes = tuple(name.removeprefix("*") for name in canonical if name.startswith("*"))
        self.allows_any = not names

    def allows(self, host: str) -> bool:
        """`host` is the header's value."""
        found = _HOST.fullmatch(host.lower())
        return found is not None and (found[1] in self._names or found[1].endswith(self._suffixes))


class HostMiddleware:
    """Lets requests in that have one Host header with an allowed name.

    Machines ask for a server's health by its address, so that is told under any name.
    """

    def __init__(self, app: ASGIApp, *, names: HostNames) -> None:
        self._app = app
        self._names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = self._complaint(scope) if scope["type"] == "http" else None
        if message is None:
            await self._app(scope, receive, send)
        else:
            await refuse(ClientError(message, param="Host", code="invalid_host"), scope, receive, send)

    def _complaint(self, scope: Scope) -> str | None:
        given = [value for name, value in scope["headers"] if name == b"host"]
        if len(given) > 1 or (not given and scope.get("http_version") == "1.1"):
            return f"the request must have one Host header, and has {len(given)}"
        if self._names.allows_any or scope["method"] in OPEN.get(scope.get("raw_path", b""), ()):
            return None
        if given and self._names.allows(given[0].decode("latin-1")):
            return None
        return "the Host header does not name this server: its names are set with --allowed-hosts"


def _canonical(name: str) -> str:
    canonical = name.lower()
    if canonical.count(":") > 1 and not canonical.startswith("["):
        canonical = f"[{canonical}]"
    if not _PATTERN.fullmatch(canonical):
        raise ConfigError(f"allowed_hosts: {name!r} is not a host: give a name or an address, without a port")
    return canonical
