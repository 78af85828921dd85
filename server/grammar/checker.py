"""Whether a client's grammar may be compiled, found out in processes that can be killed.

The library is native and recursive: there are sources of a few kilobytes that it compiles for minutes, or that end
the process by overflowing its stack. So each new source is tried in a child first, for about a second at most.
There are several children, and a client with a key of its own has one of them at most, so that it delays itself and
not the others. Knows the children; knows nothing of requests. Lives in one event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Coroutine
from typing import Any, TypeVar

from server.errors import ClientError, UnavailableError
from server.grammar.check_child import CheckChild, ChildLostError
from server.grammar.check_worker import frame
from server.grammar.sources import KINDS, check_size
from server.grammar.turns import Turns
from server.grammar.vocabulary import VocabularySpec
from server.types import GrammarSpec

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 10.0  # a child ends itself long before, unless the machine has no time for it
_REMEMBERED = 4096

Result = TypeVar("Result")


class GrammarChecker:
    """`num_children` processes, each replaced as soon as a grammar has ended it. `start` and `close` it."""

    def __init__(self, vocabulary: VocabularySpec, *, num_children: int = 2) -> None:
        self._children = [CheckChild(frame(vocabulary)) for _ in range(num_children)]
        self._turns = Turns(self._children)
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def start(self) -> None:
        """Start all children and wait until they are ready. Raises UnavailableError."""
        await asyncio.gather(*(self._ensure_running(child) for child in self._children))

    async def close(self) -> None:
        """End all children. Checks that wait, run or come later raise UnavailableError."""
        self._closed = True
        self._turns.refuse_all(_closed())
        for child in self._children:
            child.kill()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(child.stop() for child in self._children))

    async def check(self, spec: GrammarSpec, *, key: str = "") -> None:
        """Raises ClientError with `spec.param` for what is malformed, not supported, too slow or too complex.

        `key` tells clients apart. Raises UnavailableError when no child can be started or the machine is too busy. A
        source that has not been seen lately takes `check_worker.CHECK_SECONDS` of CPU time at most, from its turn on.
        """
        check_size(spec)
        digest = hashlib.sha256(f"{spec.kind}:{spec.source}".encode()).digest()
        if digest in self._verdicts:
            self._verdicts.move_to_end(digest)
            verdict = self._verdicts[digest]
        else:
            if self._closed:
                raise _closed()
            child = await self._turns.take(key)
            # A client may leave, but a child must be heard out.
            verdict = await asyncio.shield(self._spawn(self._judge(child, key, digest, spec)))
        if verdict is not None:
            raise ClientError(verdict, param=spec.param)

    def _spawn(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._end)
        return task

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # told to whoever still waits for it; else nobody asks

    async def _judge(self, child: CheckChild, key: str, digest: bytes, spec: GrammarSpec) -> str | None:
        """Why a source is refused, or None. Gives the child back, at once or after it has been replaced."""
        try:
            if digest not in self._verdicts:  # others may have asked meanwhile
                self._verdicts[digest] = await self._try(child, spec)
                if len(self._verdicts) > _REMEMBERED:
                    self._verdicts.popitem(last=False)
            return self._verdicts[digest]
        finally:
            if child.is_running or self._closed:
                self._turns.give_back(child, key)
            else:
                self._spawn(self._replace(child, key))

    async def _try(self, child: CheckChild, spec: GrammarSpec) -> str | None:
        await self._ensure_running(child)
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                return (await child.ask(spec)).refusal
        except TimeoutError:
            await child.stop()
            raise _unavailable() from None
        except ChildLostError:
            if self._closed:
                raise _closed() from None
            await child.stop()
            return f"{KINDS[spec.kind]} is not supported: it is too large or too complex"

    async def _ensure_running(self, child: CheckChild) -> None:
        if self._closed:
            raise _closed()
        if child.is_running:
            return
        try:
            await child.start()
        except ChildLostError:
            raise _unavailable() from None
        if self._closed:
            raise _closed()

    async def _replace(self, child: CheckChild, key: str) -> None:
        logger.warning("a grammar took too long or broke the process that tried it; replacing the process")
        try:
            await self._ensure_running(child)
        except UnavailableError:
            logger.warning("the process could not be replaced; the next grammar tries again")
        finally:
            self._turns.give_back(child, key)


def _unavailable() -> UnavailableError:
    return UnavailableError("the grammar could not be checked; try again", code="grammar_checker_unavailable")


def _closed() -> UnavailableError:
    return UnavailableError("the server is shutting down")
