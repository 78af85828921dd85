"""The images of one request, from URLs to tiles, all at once; and a memory of pictures seen before.

A conversation sends its pictures again with every turn, so decoded tiles are kept for a while. They are found by the
content of the file, never by its URL: what a URL leads to may change.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import msgspec

from server.errors import ClientError
from server.inputs.image_fetch import ImageFetcher, parse_data_url
from server.inputs.image_pool import ImagePool
from server.inputs.image_processor import tile_count
from server.observability.metrics import ServerMetrics
from server.types import ImageDetail, ImageInput, ImageSettings, Tile

Tiles = tuple[Tile, ...]

_ENTRY_OVERHEAD_BYTES = 1024  # keys and objects beside the pixels, so that many small entries count for something


class ImageLoader:
    """Loads images for requests. Owns the fetcher and the pool that it is given: `start` and `close` are theirs too."""

    def __init__(
        self,
        fetcher: ImageFetcher,
        pool: ImagePool,
        settings: ImageSettings,
        *,
        splitting: Literal["auto", "on", "off"],
        max_bytes: int,
        cache_bytes: int = 256 << 20,
        metrics: ServerMetrics,
    ) -> None:
        """`splitting` is what detail "auto" means, and its own "auto" is the checkpoint's `do_image_splitting`.

        `max_bytes` bounds a data URL's file, `cache_bytes` the tiles kept; 0 keeps none.
        """
        self._fetcher = fetcher
        self._pool = pool
        self._split_by_default = settings.do_image_splitting if splitting == "auto" else splitting == "on"
        self._settings_bytes = msgspec.msgpack.encode(settings)
        self._max_bytes = max_bytes
        self._cache = _TileCache(cache_bytes)
        self._metrics = metrics

    async def start(self) -> None:
        """Raises UnavailableError if an image worker does not come up."""
        await self._pool.start()

    async def close(self) -> None:
        """End the workers; calls of `load` that still run fail."""
        await self._pool.close()
        await self._fetcher.close()

    def num_tiles(self, image: ImageInput) -> int:
        """How many tiles `load` will give for an image: known before anything is downloaded."""
        return tile_count(split=self._is_split(image.detail))

    async def load(self, images: Sequence[ImageInput]) -> list[Tiles]:
        """The tiles of each image, in order: 5 for a split one, 1 for a whole one.

        A URL is fetched once and decoded once for each way it is cut, however often it is named. The first failure
        ends the rest of the request and is raised: ClientError with the `param` of the image that first named the
        URL, or UnavailableError.
        """
        files: dict[str, asyncio.Task[bytes]] = {}
        tiles: dict[tuple[str, bool], asyncio.Task[Tiles]] = {}
        wanted = [(image.url, self._is_split(image.detail)) for image in images]
        try:
            async with asyncio.TaskGroup() as group:
                for image, key in zip(images, wanted, strict=True):
                    url, split = key
                    if url not in files:
                        files[url] = group.create_task(self._read(url, image.param))
                    if key not in tiles:
                        tiles[key] = group.create_task(self._tiles(files[url], split=split, param=image.param))
        except BaseExceptionGroup as failures:
            # A failed file also fails the tasks that wait for it, with the same exception.
            first = failures.exceptions[0]
            if isinstance(first, ClientError):
                self._metrics.record_image_error(first.code)
            raise first from None
        if images:
            inline = sum(_is_data_url(image.url) for image in images)
            self._metrics.record_images(data=inline, http=len(images) - inline)
        return [tiles[key].result() for key in wanted]

    def _is_split(self, detail: ImageDetail) -> bool:
        return self._split_by_default if detail == "auto" else detail == "high"

    async def _read(self, url: str, param: str) -> bytes:
        if _is_data_url(url):
            return await asyncio.to_thread(parse_data_url, url, max_bytes=self._max_bytes, param=param)
        started = time.perf_counter()
        data = await self._fetcher.fetch(url, param=param)
        self._metrics.record_image_fetch(time.perf_counter() - started)
        return data

    async def _tiles(self, file: asyncio.Task[bytes], *, split: bool, param: str) -> Tiles:
        data = await file
        key = await asyncio.to_thread(self._content_key, data, split)
        tiles = self._cache.get(key)
        self._metrics.record_image_lookup(hit=tiles is not None)
        if tiles is None:
            tiles = await self._pool.tiles(data, split=split, param=param)
            self._cache.put(key, tiles)
        return tiles

    def _content_key(self, data: bytes, split: bool) -> bytes:
        """SHA-256 of everything the tiles depend on. What precedes the file has a length of its own: no collisions."""
        head = len(self._settings_bytes).to_bytes(4, "big") + self._settings_bytes + bytes([split])
        digest = hashlib.sha256(head)
        digest.update(data)
        return digest.digest()


class _TileCache:
    """Tiles by content key, least recently used out first, at most `max_bytes` in all."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, Tiles] = OrderedDict()
        self._bytes = 0

    def get(self, key: bytes) -> Tiles | None:
        tiles = self._entries.get(key)
        if tiles is not None:
            self._entries.move_to_end(key)
        return tiles

    def put(self, key: bytes, tiles: Tiles) -> None:
        size = _size(tiles)
        if key in self._entries or size > self._max_bytes:
            return
        self._entries[key] = tiles
        self._bytes += size
        while self._bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= _size(oldest)


def _size(tiles: Tiles) -> int:
    return _ENTRY_OVERHEAD_BYTES + sum(len(tile.pixels) for tile in tiles)


def _is_data_url(url: str) -> bool:
    return url[:5].lower() == "data:"
