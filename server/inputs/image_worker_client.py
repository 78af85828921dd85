"""One image worker, as its parent sees it: a process, the two pipes to it, and a reply for a job.

The process may have been taken over by the file that it holds. So its replies are bounded and checked, and of what it
says only sizes, pixels and messages are used.
"""

from __future__ import annotations

import asyncio
import sys

import msgspec

from server import sandbox
from server.errors import UnavailableError
from server.inputs.image_processor import tile_count
from server.inputs.image_worker import Job, Reply
from server.types import ImageSettings

_START_SECONDS = 30.0  # a bare interpreter and Pillow: 0.1 s on an idle machine
_WRITE_CHUNK = 256 << 10  # what the event loop copies at a time
_READ_BUFFER = 1 << 20
_MAX_REPLY_BYTES = 1 << 16  # a reply without its pixels is a few hundred bytes
# Have glibc hand the memory of a large picture back at once: without, a worker keeps 200 MB after 40 megapixels.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


class WorkerLostError(Exception):
    """The process ended, or said something that makes no sense."""


class WorkerClient:
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
        except (OSError, TimeoutError, WorkerLostError):
            await self.stop()
            raise UnavailableError("no image worker could be started", code="image_worker_unavailable") from None

    async def ask(self, job: Job, data: bytes) -> tuple[Reply, list[bytes]]:
        """The reply and the pixels of its tiles, or the reply that says why there are none. Raises WorkerLostError.

        If this is cancelled, the worker is in the middle of something and must be restarted.
        """
        if self._process is None:
            raise WorkerLostError
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
                return reply, []
            if len(reply.tiles) != tile_count(split=job.split):
                raise WorkerLostError
            return reply, await self._read_pixels(stdout, reply)
        except OSError:
            raise WorkerLostError from None

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
                raise WorkerLostError
            return self._replies.decode(await stdout.readexactly(length))
        except (asyncio.IncompleteReadError, msgspec.DecodeError):
            raise WorkerLostError from None

    async def _read_pixels(self, stdout: asyncio.StreamReader, reply: Reply) -> list[bytes]:
        """Sizes are checked first: nobody makes this process buy memory."""
        pixels = []
        try:
            for tile in reply.tiles:
                if not (0 < tile.height <= self._longest_side and 0 < tile.width <= self._longest_side):
                    raise WorkerLostError
                pixels.append(await stdout.readexactly(tile.height * tile.width * 3))
        except asyncio.IncompleteReadError:
            raise WorkerLostError from None
        return pixels


def _pipes(process: asyncio.subprocess.Process) -> tuple[asyncio.StreamWriter, asyncio.StreamReader]:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("a worker is started with both pipes")
    return process.stdin, process.stdout
