"""A client that leaves cancels its request, whatever the request is waiting for.

There is one way to cancel: the work is cancelled, and the engine's generator aborts in its own `finally`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from server.types import RequestOutput

T = TypeVar("T")


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled and waited for if the client leaves first: then ClientDisconnect.

    The request's body must have been read, so that nothing but the disconnect is left to receive.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        watch.cancel()
        task.cancel()
        # Also when this very call is cancelled: nothing of the request may outlive it.
        await asyncio.gather(task, watch, return_exceptions=True)


async def close(outputs: AsyncIterator[RequestOutput]) -> None:
    """Run the generator's `finally` now, not when the garbage collector finds it."""
    if isinstance(outputs, AsyncGenerator):
        await outputs.aclose()


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
