"""The processes that decode images, as one awaitable call: file bytes in, tiles out.

Each worker holds one image at a time. A worker that hangs, crashes, or whose caller went away is killed and
replaced: whatever state it was in ends with it, and only the image it held fails.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time

import msgspec

from server import sandbox
from server.errors import ClientError, UnavailableError
from server.inputs.image_processor import tile_count
from server.inputs.image_worker import Job, Reply
from server.observability.metrics import ServerMetrics
from server.types import ImageSettings, Tile

logger = logging.getLogger(__name__)

_START_SECONDS = 30.0  # a bare interpreter and Pillow: 0.1 s on an idle machine
_WRITE_CHUNK = 256 << 10  # what the event loop copies at a time
_READ_BUFFER = 1 << 20
_MAX_REPLY_BYTES = 1 << 16  # a reply without its pixels is a few hundred bytes
# Have glibc hand the memory of a large picture back at once: without, a worker keeps 200 MB after 40 megapixels.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


class ImagePool:
    """`workers` processes that decode and resize. `start` it inside the event loop that uses it, and `close` it."""

    def __init__(
        self, workers: int, timeout: float, *, max_pixels: int, settings: ImageSettings, metrics: ServerMetrics
    ) -> None:
        """`timeout` is seconds for one image in a worker, not counting the wait for a free one."""
        # Decoded pixels take 4 bytes each, and alpha and turning need up to four copies more at once.
        memory_bytes = (1 << 30) + 24 * max_pixels
        self._workers = [_Worker(memory_bytes, settings) for _ in range(workers)]
        self._timeout = timeout
        self._max_pixels = max_pixels
        self._settings = settings
        self._metrics = metrics
        self._idle: asyncio.Queue[_Worker] = asyncio.Queue()
        self._renewals: set[asyncio.Task[None]] = set()
        self._open = False

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
        for task in self._renewals:
            task.cancel()
        await asyncio.gather(*self._renewals, return_exceptions=True)
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
                await worker.restart()
            job = Job(data_length=len(data), split=split, max_pixels=self._max_pixels, settings=self._settings)
            started = time.perf_counter()
            async with asyncio.timeout(self._timeout):
                reply, tiles = await worker.ask(job, data)
            healthy = True
        except TimeoutError:
            raise ClientError(
                f"the image took longer than {self._timeout:g} seconds to decode", code="image_parse_error", param=param
            ) from None
        except _WorkerLostError:
            self._check_open()  # `close` kills workers too
            raise ClientError("the image could not be decoded", code="image_parse_error", param=param) from None
        finally:
            self._give_back(worker, healthy=healthy)
        if reply.code is not None:
            raise ClientError(reply.message, code=reply.code, param=param)
        self._record(reply, time.perf_counter() - started)
        return tiles

    def _record(self, reply: Reply, seconds: float) -> None:
        """Count a worker's own times, unless they cannot be true: a hostile file may have taken it over."""
        decode, preprocess = reply.decode_seconds, reply.preprocess_seconds
        if decode >= 0 and preprocess >= 0 and decode + preprocess <= seconds:
            self._metrics.record_image_decode(decode, preprocess_seconds=preprocess)

    async def _take(self) -> _Worker:
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

    def _give_back(self, worker: _Worker, *, healthy: bool) -> None:
        """The one place where a worker comes home, at once or after it has been replaced."""
        if healthy or not self._open:
            self._idle.put_nowait(worker)
            return
        task = asyncio.create_task(self._renew(worker))
        self._renewals.add(task)
        # In callbacks, not in the task: a task that is cancelled before its first step runs no `finally`.
        task.add_done_callback(self._renewals.discard)
        task.add_done_callback(lambda _: self._idle.put_nowait(worker))

    async def _renew(self, worker: _Worker) -> None:
        logger.warning("an image worker hung, crashed or was abandoned; replacing it")
        try:
            await worker.restart()
        except UnavailableError:
            logger.exception("an image worker could not be replaced; the next image tries again")


class _WorkerLostError(Exception):
    """The process ended, or said something that makes no sense."""


class _Worker:
    """One process and the pipes to it. Not reentrant: the pool sees to it that one call is made at a time."""

    def __init__(self, memory_bytes: int, settings: ImageSettings) -> None:
        self._memory_bytes = memory_bytes
        self._longest_side = max(settings.shortest_edge, settings.longest_edge)
        self._replies = msgspec.msgpack.Decoder(Reply)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start the process and wait until it is ready. Raises UnavailableError."""
        try:
            async with asyncio.timeout(_START_SECONDS):
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "server.inputs.image_worker",
                    str(self._memory_bytes),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    limit=_READ_BUFFER,
                    cwd=sandbox.PACKAGE_PARENT,
                    env=sandbox.environment() | _MALLOC,
                )
                await self._read_reply(_pipes(self._process)[1])
        except (OSError, TimeoutError, _WorkerLostError):
            await self.stop()
            raise UnavailableError("no image worker could be started", code="image_worker_unavailable") from None

    async def ask(self, job: Job, data: bytes) -> tuple[Reply, tuple[Tile, ...]]:
        """The reply and its tiles, or the reply that says why there are none. Raises _WorkerLostError.

        If this is cancelled, the worker is in the middle of something and must be restarted.
        """
        if self._process is None:
            raise _WorkerLostError
        stdin, stdout = _pipes(self._process)
        try:
            message = msgspec.msgpack.encode(job)
            stdin.write(len(message).to_bytes(4, "big") + message)
            view = memoryview(data)
            for start in range(0, len(view), _WRITE_CHUNK):
                stdin.write(view[start : start + _WRITE_CHUNK])
                await stdin.drain()
            reply = await self._read_reply(stdout)
            if reply.code is not None:
                return reply, ()
            if len(reply.tiles) != tile_count(split=job.split):
                raise _WorkerLostError
            return reply, await self._read_tiles(stdout, reply)
        except OSError:
            raise _WorkerLostError from None

    async def restart(self) -> None:
        """End the process, whatever it is doing, and start another. Raises UnavailableError."""
        await self.stop()
        await self.start()

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def stop(self) -> None:
        """Kill the process and wait until it and its pipes are gone; harmless if they are."""
        if self._process is None:
            return
        stdin, _ = _pipes(self._process)
        self.kill()
        stdin.close()
        await self._process.communicate()  # reads what is left, so that the pipe sees its end and closes
        self._process = None

    async def _read_reply(self, stdout: asyncio.StreamReader) -> Reply:
        try:
            length = int.from_bytes(await stdout.readexactly(4), "big")
            if length > _MAX_REPLY_BYTES:
                raise _WorkerLostError
            return self._replies.decode(await stdout.readexactly(length))
        except (asyncio.IncompleteReadError, msgspec.DecodeError):
            raise _WorkerLostError from None

    async def _read_tiles(self, stdout: asyncio.StreamReader, reply: Reply) -> tuple[Tile, ...]:
        """Sizes are checked: a worker that a hostile file has taken over must not make this process buy memory."""
        tiles = []
        try:
            for header in reply.tiles:
                if not (0 < header.height <= self._longest_side and 0 < header.width <= self._longest_side):
                    raise _WorkerLostError
                pixels = await stdout.readexactly(header.height * header.width * 3)
                tiles.append(Tile(key=header.key, height=header.height, width=header.width, pixels=pixels))
        except asyncio.IncompleteReadError:
            raise _WorkerLostError from None
        return tuple(tiles)


def _pipes(process: asyncio.subprocess.Process) -> tuple[asyncio.StreamWriter, asyncio.StreamReader]:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("a worker is started with both pipes")
    return process.stdin, process.stdout
