"""Takes lines from the input, keeps so many in flight, and writes a line of output for each as it is answered.

Knows what becomes of a line. HTTP is the sender's, the file the output's business.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec

from server.batch.lines import Rejection, Request, parse_line
from server.batch.output import ID_PREFIX, BatchOutput, Claim, LineError, LineResponse, OutputLine, RunStopped
from server.batch.sender import Abandoned, LineFailed, Sender


@dataclass(slots=True)
class Tally:
    """What became of the lines so far. Skipped ones were answered by an earlier run; tokens are this run's."""

    ok: int = 0
    failed: int = 0
    skipped: int = 0
    skipped_failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    in_flight: int = 0
    started: float = field(default_factory=time.perf_counter)
    ended: float | None = None

    @property
    def done(self) -> int:
        return self.ok + self.failed + self.skipped

    @property
    def seconds(self) -> float:
        return (time.perf_counter() if self.ended is None else self.ended) - self.started


class BatchRunner:
    """One run over one input. `stopping` is set by whoever wants it to end early."""

    def __init__(
        self,
        lines: Iterator[tuple[int, bytes | None]],
        output: BatchOutput,
        *,
        tally: Tally,
        stopping: asyncio.Event,
        on_line: Callable[[], None],
    ) -> None:
        """`tally` is kept up to date; `on_line` is called after each line that is done."""
        self._lines = lines
        self._output = output
        self._tally = tally
        self._stopping = stopping
        self._on_line = on_line

    async def run(self, sender: Sender, urls: frozenset[str] | None, *, max_in_flight: int) -> None:
        """Until the input ends or `stopping` is set and what is in flight is answered. Raises RunStopped.

        Each worker takes a line when it has written the one before, so that no more are ever held than are in flight.
        """
        self._tally.started = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(max_in_flight):
                    workers.create_task(self._work(sender, urls))
        except* RunStopped as stopped:
            reasons = stopped
        else:
            return
        finally:
            self._tally.ended = time.perf_counter()
        raise _first(reasons)

    async def _work(self, sender: Sender, urls: frozenset[str] | None) -> None:
        while not self._stopping.is_set():
            item = self._next_line()
            if item is None:
                return
            line = parse_line(*item, urls)
            claim = self._output.ledger.claim(line.number, line.custom_id)
            if claim in (Claim.ANSWERED, Claim.FAILED):
                self._tally.skipped += 1
                self._tally.skipped_failed += claim is Claim.FAILED
            elif claim is Claim.DUPLICATE:
                message = "an earlier line has the same 'custom_id'"
                self._reject(Rejection(line.number, line.custom_id, "duplicate_custom_id", message, "custom_id"))
            elif isinstance(line, Rejection):
                self._reject(line)
            else:
                await self._answer(line, sender)
            self._on_line()
            await asyncio.sleep(0)  # a million lines that need no answer must not hold up those that do

    def _next_line(self) -> tuple[int, bytes | None] | None:
        try:
            return next(self._lines, None)
        except OSError as error:
            raise RunStopped(f"cannot read the input: {error.strerror}") from None

    def _reject(self, line: Rejection) -> None:
        self._write(line.custom_id, error=LineError(line.code, line.message, line.param, line.number))
        self._tally.failed += 1

    async def _answer(self, line: Request, sender: Sender) -> None:
        self._tally.in_flight += 1
        try:
            answer = await sender.send(line.url, line.body)
        except LineFailed as failure:
            self._reject(Rejection(line.number, line.custom_id, failure.code, failure.message))
            return
        except Abandoned:
            return
        finally:
            self._tally.in_flight -= 1
        self._write(line.custom_id, response=(answer.status, answer.request_id, answer.body))
        if answer.status == 200:
            self._tally.ok += 1
            self._tally.tokens_in += answer.tokens_in
            self._tally.tokens_out += answer.tokens_out
        else:
            self._tally.failed += 1

    def _write(
        self,
        custom_id: str | None,
        *,
        response: tuple[int, str | None, bytes] | None = None,
        error: LineError | None = None,
    ) -> None:
        name = ID_PREFIX + uuid.uuid4().hex
        said = None
        if response is not None:
            status, request_id, body = response
            said = LineResponse(status, request_id or name, msgspec.Raw(body))
        self._output.append(OutputLine(name, custom_id, said, error))


def _first(group: BaseExceptionGroup[RunStopped]) -> RunStopped:
    """One reason is enough: the others have the same one, or were in flight when it struck."""
    for error in group.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise ValueError("an exception group is never empty")
