"""A fetcher that may reach web servers on this machine, and what tests ask of it."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from server.errors import ClientError
from server.inputs.image_fetch import ImageFetcher
from tests.inputs.loopback import Handler, WebServer, web_server

PARAM = "messages[0].content[1].image_url.url"
BODY = bytes(range(256)) * 40
LOOPBACK = ipaddress.ip_network("127.0.0.0/8")
NAMES = {
    "pictures.example": ["127.0.0.1"],
    "inside.example": ["10.1.2.3"],
    "cloud.example": ["169.254.169.254"],
    "metadata.google.internal": ["169.254.169.254"],
}


class Names:
    """A resolver with made-up answers; asks the system about names it does not know. Counts the questions."""

    def __init__(self, names: dict[str, list[str]] | None = None) -> None:
        self.names = NAMES if names is None else names
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host in self.names:
            return self.names[host]
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [str(entry[4][0]) for entry in found]


def fetcher_for(server: WebServer, *, timeout: float = 10.0, **options: Any) -> ImageFetcher:
    """A fetcher that may dial this machine, and only on the server's port besides 80 and 443."""
    options = {"resolver": Names(), "extra_networks": [LOOPBACK]} | options
    return ImageFetcher(options.pop("max_bytes", 1 << 20), timeout, extra_ports=[server.port], **options)


def record_dials() -> list[tuple[str, int]]:
    """From now on, every connection that the running loop is asked to make."""
    loop = asyncio.get_running_loop()
    dialled: list[tuple[str, int]] = []
    connect = loop.create_connection

    async def recorded(factory: Any, host: Any = None, port: Any = None, **options: Any) -> Any:
        dialled.append((host, port))
        return await connect(factory, host, port, **options)

    loop.create_connection = recorded  # type: ignore[assignment, method-assign]
    return dialled


async def refusal(call: Awaitable[object]) -> ClientError:
    with pytest.raises(ClientError) as caught:
        await call
    error = caught.value
    assert (error.status, error.param) == (400, PARAM)
    # Neither names nor addresses, of theirs or ours.
    assert not re.search(r"example|localhost|\d+\.\d+\.\d+|::|errno|Error|0x", error.message)
    return error


def fetch_all(
    handlers: dict[str, Handler], test: Callable[[WebServer, ImageFetcher, str], Awaitable[None]], **options: Any
) -> None:
    """Run `test(server, fetcher, url of the server)`."""

    async def run() -> None:
        async with web_server(handlers) as server, asyncio.timeout(60):
            await test(server, fetcher_for(server, **options), f"http://pictures.example:{server.port}")
        await asyncio.sleep(0.01)  # a body that was not read to its end is closed by tasks of the loop's own
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
