"""The images of one request, from URLs to tiles, all at once; and a memory of pictures seen before.

A conversation sends its pictures again with every turn, so decoded tiles are kept for a while. They are found by the
content of the file, never by its URL: what a URL leads to may change. A salt keeps what one client has sent from being
found by another, here and by the tiles' keys in whatever lies behind.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from server.errors import ClientError
from server.inputs.image_data_url import is_data_url, parse_data_url
from server.inputs.image_fetch import ImageFetcher
from server.inputs.image_pool import ImagePool
from server.inputs.image_processor import tile_count
from server.observability.metrics import ServerMetrics
from server.types import ImageDetail, ImageInput, ImageSettings, Tile

Tiles = tuple[Tile, ...]

_KEY_VERSION = b"idefics2-salted-tile/1"
_ENTRY_OVERHEAD_BYTES = 1024  # keys and objects beside the pixels, so that many small entries count for something


class ImageLoader:
    """Loads images for requests. Owns the pool that it is given: `start` and `close` are the pool's too."""

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
        # Reading a data URL holds the interpreter lock: several at once would take no less time in all, and keep the
        # event loop waiting for its turn behind each of them.
        self._parsing = asyncio.Semaphore(1)
        self._cache = _TileCache(cache_bytes)
        self._metrics = metrics

    async def start(self) -> None:
        """Raises UnavailableError if an image worker does not come up."""
        await self._pool.start()

    async def close(self) -> None:
        """End the workers; calls of `load` that still run fail."""
        await self._pool.close()

    @property
    def is_healthy(self) -> bool:
        """Whether pictures can be decoded as far as is known."""
        return self._pool.is_healthy

    def num_tiles(self, image: ImageInput) -> int:
        """How many tiles `load` will give for an image: known before anything is downloaded."""
        return tile_count(split=self._is_split(image.detail))

    async def load(self, images: Sequence[ImageInput], *, key: str = "", salt: str = "") -> list[Tiles]:
        """The tiles of each image, in order: 5 for a split one, 1 for a whole one.

        `key` names the API key of who asks, whose share of the downloads is bounded. Requests with different salts
        never find each other's pictures, and their tiles have different keys.

        A URL is fetched once, and a file decoded once for each way it is cut, however often they are named. The first
        failure ends the rest of the request and is raised: ClientError with the `param` of an image that named the
        file, or UnavailableError.
        """
        # A data URL goes by its place: to look up megabytes of text in a dictionary would hold up the event loop.
        names = [place if is_data_url(image.url) else image.url for place, image in enumerate(images)]
        files: dict[int | str, asyncio.Task[bytes]] = {}
        tiles: list[asyncio.Task[Tiles]] = []
        try:
            async with asyncio.TaskGroup() as group:
                request = _Request(group, salt.encode("utf-8", "surrogatepass"))  # a client may have chosen it
                for name, image in zip(names, images, strict=True):
                    if name not in files:
                        files[name] = group.create_task(self._read(image.url, image.param, key))
                    split = self._is_split(image.detail)
                    tiles.append(group.create_task(self._tiles(files[name], request, split=split, param=image.param)))
        except BaseExceptionGroup as failures:
            # A failed file also fails the tasks that wait for it, with the same exception.
            first = failures.exceptions[0]
            if isinstance(first, ClientError):
                self._metrics.record_image_error(first.code)
            raise first from None
        if images:
            inline = sum(is_data_url(image.url) for image in images)
            self._metrics.record_images(data=inline, http=len(images) - inline)
        return [task.result() for task in tiles]

    def _is_split(self, detail: ImageDetail) -> bool:
        return self._split_by_default if detail == "auto" else detail == "high"

    async def _read(self, url: str, param: str, key: str) -> bytes:
        if is_data_url(url):
            async with self._parsing:
                return await asyncio.to_thread(parse_data_url, url, max_bytes=self._max_bytes, param=param)
        started = time.perf_counter()
        data = await self._fetcher.fetch(url, param=param, key=key)
        self._metrics.record_image_fetch(time.perf_counter() - started)
        return data

    async def _tiles(self, file: asyncio.Task[bytes], request: _Request, *, split: bool, param: str) -> Tiles:
        data = await file
        key = await asyncio.to_thread(self._content_key, data, split, request.salt)
        if key not in request.tiles:
            request.tiles[key] = request.group.create_task(
                self._find_or_decode(key, data, split=split, param=param, salt=request.salt)
            )
        return await request.tiles[key]

    async def _find_or_decode(self, key: bytes, data: bytes, *, split: bool, param: str, salt: bytes) -> Tiles:
        tiles = self._cache.get(key)
        self._metrics.record_image_lookup(hit=tiles is not None)
        if tiles is None:
            tiles = _salted(await self._pool.tiles(data, split=split, param=param), salt)
            self._cache.put(key, tiles)
        return tiles

    def _content_key(self, data: bytes, split: bool, salt: bytes) -> bytes:
        """SHA-256 of everything the tiles depend on. All that precedes the file is framed: no collisions."""
        digest = hashlib.sha256(_framed(self._settings_bytes) + _framed(salt) + bytes([split]))
        digest.update(data)
        return digest.digest()


@dataclass
class _Request:
    """What the tasks of one request share: their group, and the tiles on their way, by content key."""

    group: asyncio.TaskGroup
    salt: bytes
    tiles: dict[bytes, asyncio.Task[Tiles]] = field(default_factory=dict)


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


def _salted(tiles: Tiles, salt: bytes) -> Tiles:
    """The tiles under keys that only requests with the same salt have; without a salt, as they are."""
    if not salt:
        return tiles
    head = _KEY_VERSION + _framed(salt)
    return tuple(msgspec.structs.replace(tile, key=hashlib.sha256(head + tile.key).digest()) for tile in tiles)


def _framed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data
