"""Names to addresses by the system's resolver, without letting a name server that never answers hold anything up."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

from server.inputs.image_fetch_limits import KeyShares


class SystemResolver:
    """`getaddrinfo`, each call in a daemon thread of its own.

    The call cannot be cancelled, and glibc waits for ten seconds and more. So a lookup counts as its key's until it
    has really ended, however early its caller gave up: no key can use up more threads than its share.
    """

    def __init__(self, concurrency: int) -> None:
        self._shares = KeyShares(concurrency)

    async def resolve(self, host: str, port: int, *, key: str) -> list[str]:
        """The host's addresses as text. Raises OSError if there is none."""
        await self._shares.acquire(key)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[str]] = loop.create_future()

        def finish(found: list[str] | OSError) -> None:
            self._shares.release(key)
            if answer.done():  # the caller has gone
                return
            if isinstance(found, OSError):
                answer.set_exception(found)
            else:
                answer.set_result(found)

        def look_up() -> None:
            found: list[str] | OSError
            try:
                entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                found = [str(sockaddr[0]) for _, _, _, _, sockaddr in entries]
            except OSError as error:
                found = error
            except UnicodeError:  # a label that Python's own IDNA refuses
                found = socket.gaierror(socket.EAI_NONAME, "not a host name")
            with contextlib.suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(finish, found)

        # Daemons: a process that ends does not wait for name servers.
        threading.Thread(target=look_up, name="resolve", daemon=True).start()
        return await answer
