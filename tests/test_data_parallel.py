"""Two real engines in processes of their own behind one real server."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.serving import SMALL, Server, running_server

LONG = 1200  # tokens of an answer that is still growing when its engine is killed


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("two") / "log"
    with running_server(tiny_checkpoint, log, *SMALL, "--data-parallel-size", "2") as server:
        yield server
        assert server.stop() == 0


def body(number: int, max_tokens: int) -> dict[str, object]:
    return {
        "model": "m",
        "prompt": f"{number} is the number that this text begins with, and it goes on.",
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


async def complete(http: httpx.AsyncClient, model: str, number: int, max_tokens: int = 24) -> tuple[int, str]:
    """Status and text, or the code of an error."""
    answer = await http.post("/v1/completions", json={**body(number, max_tokens), "model": model})
    told = answer.json()
    return answer.status_code, told["choices"][0]["text"] if answer.status_code == 200 else told["error"]["code"]


def clients(server: Server) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=server.base_url, timeout=120)


async def model_of(http: httpx.AsyncClient) -> str:
    name: str = (await http.get("/v1/models")).json()["data"][0]["id"]
    return name


def cpu_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_both_engines_work_and_answer_alike(server: Server) -> None:
    async def scenario() -> None:
        async with clients(server) as http:
            model = await model_of(http)
            alone = [await complete(http, model, number) for number in range(8)]
            pids = server.engine_pids
            assert len(pids) == 2
            before = [cpu_ticks(pid) for pid in pids]
            # The same questions in another order: half of them find an engine that has not seen them.
            again = await asyncio.gather(*(complete(http, model, number, 24) for number in reversed(range(8))))
            assert list(reversed(again)) == alone
            await asyncio.gather(*(complete(http, model, 100 + number, 200) for number in range(8)))
            assert all(cpu_ticks(pid) > ticks for pid, ticks in zip(pids, before, strict=True))

    asyncio.run(scenario())


def test_an_engine_that_is_killed_takes_only_its_own_answers_with_it(server: Server) -> None:
    async def scenario() -> None:
        async with clients(server) as http:
            model = await model_of(http)
            expected = {number: await complete(http, model, number, 40) for number in range(200, 206)}
            long = [asyncio.ensure_future(complete(http, model, number, LONG)) for number in (300, 301)]
            async with asyncio.timeout(60):
                while await asyncio.to_thread(server.metric, "num_requests_running") < 2:
                    await asyncio.sleep(0.02)
            victim = server.engine_pids[0]
            os.kill(victim, signal.SIGKILL)
            statuses = []
            for number in expected:
                # The server takes requests all the time, and answers them as before.
                statuses.append((await http.get("/health/ready")).status_code)
                assert await complete(http, model, number, 40) == expected[number]
            assert set(statuses) == {200}
            ends = [await task for task in long]
            assert sorted(status for status, _ in ends) == [200, 503]
            assert {text for status, text in ends if status == 503} == {"engine_unavailable"}
            async with asyncio.timeout(60):
                while await asyncio.to_thread(server.metric, "engine_up") < 2:
                    await asyncio.sleep(0.1)
            assert victim not in server.engine_pids
            assert len(server.engine_pids) == 2
            assert server.metric("engine_restarts_total", 'reason="died"') == 1
            assert (await complete(http, model, 400))[0] == 200
            await asyncio.to_thread(server.wait_until_idle)

    asyncio.run(scenario())
