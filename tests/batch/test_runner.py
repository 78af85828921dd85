"""What the runner holds and when it stops, against a real server and a real file."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.responses import Response

from server.batch.output import BatchOutput, RunStopped
from server.batch.runner import BatchRunner, Tally
from server.batch.sender import Patience, Sender, Target
from tests.batch.canned import CannedServer, Script, answer, refusal, slowly
from tests.batch.files import by_id, line, read_output

Item = tuple[int, bytes | None]


def lines(count: int) -> Iterator[Item]:
    for number in range(1, count + 1):
        yield number, json.dumps(line(f"{number}")).encode()


def answer_all(script: Script, items: Iterator[Item], path: Path, tally: Tally, *, max_in_flight: int) -> CannedServer:
    async def main(server: CannedServer) -> None:
        stopping = asyncio.Event()
        with BatchOutput(path) as output:
            async with httpx.AsyncClient(base_url=server.url, timeout=10.0) as client:
                sender = Sender(Target(client), Patience(), stopping)
                runner = BatchRunner(items, output, tally=tally, stopping=stopping, on_line=lambda: None)
                await asyncio.wait_for(runner.run(sender, None, max_in_flight=max_in_flight), 30.0)

    with CannedServer(script).running() as server:
        asyncio.run(main(server))
    return server


def test_no_more_lines_are_held_than_are_in_flight(tmp_path: Path) -> None:
    tally, held = Tally(), []

    def watched() -> Iterator[Item]:
        for taken, item in enumerate(lines(60), start=1):
            held.append(taken - tally.done)
            yield item

    server = answer_all(slowly, watched(), tmp_path / "out", tally, max_in_flight=7)
    assert max(held) == server.peak == 7
    assert (tally.ok, tally.tokens_in, tally.tokens_out, tally.in_flight) == (60, 180, 120, 0)


def test_one_reason_to_stop_ends_all(tmp_path: Path) -> None:
    async def script(name: str, attempt: int) -> Response:
        if name == "10":
            return refusal(401)
        await asyncio.sleep(0.0 if int(name) < 10 else 20.0)
        return answer(name)

    with pytest.raises(RunStopped, match="key"):
        answer_all(script, lines(10**9), tmp_path / "out", Tally(), max_in_flight=5)
    # The last of those before it may have been in flight with it.
    assert {"1", "2", "3", "4", "5"} <= by_id(read_output(tmp_path / "out")).keys() <= {*"123456789"}


def test_an_input_that_cannot_be_read_on_ends_the_run(tmp_path: Path) -> None:
    def breaking() -> Iterator[Item]:
        yield from lines(3)
        raise OSError(5, "Input/output error")

    with pytest.raises(RunStopped, match="cannot read the input: Input/output error"):
        answer_all(slowly, breaking(), tmp_path / "out", Tally(), max_in_flight=1)
    assert len(read_output(tmp_path / "out")) == 3


def test_skipping_holds_up_nobody(tmp_path: Path) -> None:
    """Between lines that need no answer, others get theirs written."""
    tally, done = Tally(), []

    def watched() -> Iterator[Item]:
        yield from lines(1)
        for number in range(2, 200_000):
            if tally.ok:
                done.append(number)
                return
            yield number, None

    answer_all(slowly, watched(), tmp_path / "out", tally, max_in_flight=2)
    assert done
