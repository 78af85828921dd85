"""An image loader with all that it needs, and web servers on this machine to load from."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from server.errors import ClientError
from server.inputs.image_decode import decode_rgb
from server.inputs.image_fetch import ImageFetcher
from server.inputs.image_pool import ImagePool
from server.inputs.images import ImageLoader
from server.observability.metrics import ServerMetrics
from server.types import ImageDetail, ImageInput, ImageSettings, Tile
from tests.inputs.loopback import Handler, WebServer, web_server
from tests.inputs.pictures import make_tiles
from tests.observability.scrape import values

SETTINGS = ImageSettings(do_image_splitting=True)
LIMIT = 40_000_000


class Bench:
    """A loader with all that it needs, and what it counts."""

    def __init__(self, server: WebServer, *, settings: ImageSettings = SETTINGS, **options: Any) -> None:
        self.server = server
        self.url = f"http://127.0.0.1:{server.port}"
        self.metrics = ServerMetrics("m")
        networks = [ipaddress.ip_network("127.0.0.0/8")]
        fetcher = ImageFetcher(1 << 20, 10.0, extra_networks=networks, extra_ports=[server.port])
        self.pool = ImagePool(2, 20.0, max_pixels=LIMIT, settings=settings, metrics=self.metrics)
        options = {"splitting": "auto", "max_bytes": 1 << 20} | options
        self.loader = ImageLoader(fetcher, self.pool, settings, metrics=self.metrics, **options)

    def count(self, name: str) -> float:
        return values(self.metrics)[name]

    @property
    def num_decoded(self) -> float:
        return self.count("image_decode_seconds_count")

    async def load(
        self, *urls: str, detail: ImageDetail = "low", key: str = "", salt: str = ""
    ) -> list[tuple[Tile, ...]]:
        images = [ImageInput(url, detail, f"images[{index}]") for index, url in enumerate(urls)]
        return await self.loader.load(images, key=key, salt=salt)


def with_loader(handlers: dict[str, Handler], test: Callable[[Bench], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with web_server(handlers) as server, asyncio.timeout(60):
            bench = Bench(server, **options)
            await bench.loader.start()
            try:
                await test(bench)
            finally:
                await bench.loader.close()

    asyncio.run(run())


def tiles_of(data: bytes, *, split: bool) -> tuple[Tile, ...]:
    return tuple(make_tiles(decode_rgb(data, max_pixels=LIMIT), split=split, settings=SETTINGS))


async def refusal(call: Awaitable[object]) -> ClientError:
    with pytest.raises(ClientError) as caught:
        await call
    return caught.value
