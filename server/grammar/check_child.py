"""One child process that tries grammars, and the pipes to it. What it does is `check_worker`'s."""

from __future__ import annotations

import asyncio
import sys

import msgspec

from server import sandbox
from server.grammar.check_worker import Reply, frame
from server.types import GrammarSpec

_START_SECONDS = 30.0
_MAX_REPLY_BYTES = 1 << 12


class ChildLostError(Exception):
    """The process ended, or said something that makes no sense."""


class CheckChild:
    """Not reentrant: one call at a time. After one that was cancelled, start it again."""

    def __init__(self, vocabulary: bytes) -> None:
        """`vocabulary` is the frame of a VocabularySpec."""
        self._vocabulary = vocabulary
        self._replies = msgspec.msgpack.Decoder(Reply)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the process, or another one, and wait until it is ready. Raises ChildLostError."""
        await self.stop()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "server.grammar.check_worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                cwd=sandbox.PACKAGE_PARENT,
                env=sandbox.environment(),
            )
            async with asyncio.timeout(_START_SECONDS):
                await self._exchange(self._vocabulary)
        except BaseException as error:
            await self.stop()
            if isinstance(error, OSError):  # which a timeout is, too
                raise ChildLostError from None
            raise

    async def ask(self, spec: GrammarSpec) -> Reply:
        """Raises ChildLostError."""
        return await self._exchange(frame(spec))

    def kill(self) -> None:
        """End the process; a call that is under way then raises."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    async def stop(self) -> None:
        """Kill the process and wait until it and its pipes are gone; harmless if they are."""
        self.kill()
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        await process.communicate()  # reads what is left, so that the pipe sees its end and closes

    async def _exchange(self, data: bytes) -> Reply:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise ChildLostError
        try:
            process.stdin.write(data)
            await process.stdin.drain()
            length = int.from_bytes(await process.stdout.readexactly(4), "big")
            if length > _MAX_REPLY_BYTES:
                raise ChildLostError
            return self._replies.decode(await process.stdout.readexactly(length))
        except (ConnectionError, asyncio.IncompleteReadError, msgspec.DecodeError):
            raise ChildLostError from None
