"""The processes that decode images, as one awaitable call: file bytes in, tiles out.

Each worker holds one image at a time. A worker that hangs, crashes, or whose caller went away is killed and
replaced: whatever state it was in ends with it, and only the image it held fails.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence

from server.errors import ClientError, UnavailableError
from server.inputs.image_processor import named_tile
from server.inputs.image_worker import Job, Reply, TileSize
from server.inputs.image_worker_client import WorkerClient, WorkerLostError
from server.observability.metrics import ServerMetrics
from server.types import ImageSettings, Tile

logger = logging.getLogger(__name__)

# One start may fail for want of memory in a bad moment; three in a row say that the machine cannot do it.
_MAX_FAILED_STARTS = 3
_HEAL_SECONDS = 2.0  # between tries while nobody may be sending images; a failing start costs a tenth of a second


class ImagePool:
    """`workers` processes that decode and resize. `start` it inside the event loop that uses it, and `close` it."""

    def __init__(
        self, workers: int, timeout: float, *, max_pixels: int, settings: ImageSettings, metrics: ServerMetrics
    ) -> None:
        """`timeout` is seconds for one image in a worker, not counting the wait for a free one."""
        # Decoded pixels take 4 bytes each, and alpha and turning need up to four copies more at once.
        memory_bytes = (1 << 30) + 24 * max_pixels
        self._workers = [WorkerClient(memory_bytes, settings) for _ in range(workers)]
        self._timeout = timeout
        self._max_pixels = max_pixels
        self._settings = settings
        self._metrics = metrics
        self._idle: asyncio.Queue[WorkerClient] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = False
        self._failed_starts = 0  # in a row

    @property
    def is_healthy(self) -> bool:
        """False once workers could not be replaced several times in a row, until one comes up again."""
        return self._failed_starts < _MAX_FAILED_STARTS

    async def start(self) -> None:
        """Start all workers and wait until they are ready. Raises UnavailableError if one does not come up."""
        try:
            for worker in self._workers:
                await worker.start()
        except BaseException:
            for worker in self._workers:
                await worker.stop()
            raise
        for worker in self._workers:
            self._idle.put_nowait(worker)
        self._open = True

    async def close(self) -> None:
        """End all workers. Calls of `tiles` that still wait or run raise UnavailableError."""
        if not self._open:
            return
        self._open = False
        for worker in self._workers:
            worker.kill()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # Every call gives its worker back in the end, so waiting for all of them is waiting for all calls.
        for _ in self._workers:
            worker = await self._idle.get()
            await worker.stop()

    async def tiles(self, data: bytes, *, split: bool, param: str) -> tuple[Tile, ...]:
        """Decode an image file and cut and resize it: one tile, or five if `split`.

        Raises ClientError with `param`: the codes of `decode_rgb`, and `image_parse_error` if the image took too long
        or broke its worker. Raises UnavailableError if the pool is closed or no worker can be started.
        """
        worker = await self._take()
        healthy = False
        try:
            if not worker.running:  # it died while idle, which is no fault of this image
                await self._restart(worker)
            job = Job(data_length=len(data), split=split, max_pixels=self._max_pixels, settings=self._settings)
            started = time.perf_counter()
            async with asyncio.timeout(self._timeout):
                reply, pixels = await worker.ask(job, data)
            healthy = True
        except TimeoutError:
            raise ClientError(
                f"the image took longer than {self._timeout:g} seconds to decode", code="image_parse_error", param=param
            ) from None
        except WorkerLostError:
            self._check_open()  # `close` kills workers too
            raise ClientError("the image could not be decoded", code="image_parse_error", param=param) from None
        finally:
            self._give_back(worker, healthy=healthy)
        if reply.code is not None:
            raise ClientError(reply.message, code=reply.code, param=param)
        self._record(reply, time.perf_counter() - started)
        # Named here and not by the worker, which could otherwise pass its pixels off as another client's.
        return await asyncio.to_thread(_named, reply.tiles, pixels)

    def _record(self, reply: Reply, seconds: float) -> None:
        """Count a worker's own times, unless they cannot be true: a hostile file may have taken it over."""
        decode, preprocess = reply.decode_seconds, reply.preprocess_seconds
        if decode >= 0 and preprocess >= 0 and decode + preprocess <= seconds:
            self._metrics.record_image_decode(decode, preprocess_seconds=preprocess)

    async def _take(self) -> WorkerClient:
        self._check_open()
        started = time.perf_counter()
        worker = await self._idle.get()
        self._metrics.record_image_wait(time.perf_counter() - started)
        try:
            self._check_open()
        except UnavailableError:
            self._idle.put_nowait(worker)
            raise
        return worker

    def _check_open(self) -> None:
        if not self._open:
            raise UnavailableError("the server is shutting down")

    def _give_back(self, worker: WorkerClient, *, healthy: bool) -> None:
        """The one place where a worker comes home, at once or after it has been replaced."""
        if healthy or not self._open:
            self._idle.put_nowait(worker)
            return
        task = self._spawn(self._renew(worker))
        # In a callback, not in the task: a task that is cancelled before its first step runs no `finally`.
        task.add_done_callback(lambda _: self._idle.put_nowait(worker))

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _renew(self, worker: WorkerClient) -> None:
        logger.warning("an image worker hung, crashed or was abandoned; replacing it")
        try:
            await self._restart(worker)
        except UnavailableError:
            logger.error("an image worker could not be replaced; the next image tries again")

    async def _restart(self, worker: WorkerClient) -> None:
        """Raises UnavailableError."""
        try:
            await worker.restart()
        except UnavailableError:
            self._failed_starts += 1
            if self._failed_starts == _MAX_FAILED_STARTS:
                logger.error("image workers cannot be started: %d tries in a row have failed", _MAX_FAILED_STARTS)
                self._spawn(self._heal())
            raise
        self._failed_starts = 0

    async def _heal(self) -> None:
        """Go on trying: a server that is known to be unhealthy gets no image that would."""
        while not self.is_healthy:
            await asyncio.sleep(_HEAL_SECONDS)
            worker = await self._idle.get()
            try:
                if not worker.running:
                    await self._restart(worker)
            except UnavailableError:
                continue
            finally:
                self._idle.put_nowait(worker)
        logger.info("image workers can be started again")


def _named(sizes: Sequence[TileSize], pixels: Sequence[bytes]) -> tuple[Tile, ...]:
    return tuple(named_tile(size.height, size.width, data) for size, data in zip(sizes, pixels, strict=True))
