from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image

from server.errors import ClientError, UnavailableError
from server.inputs import image_pool
from server.inputs.image_decode import decode_rgb
from server.inputs.image_pool import ImagePool
from server.inputs.image_processor import named_tile
from server.inputs.image_worker import Job, Reply
from server.observability.metrics import ServerMetrics
from server.types import ImageSettings
from tests.inputs.pictures import encoded, make_tiles, noise, noise_png
from tests.observability.scrape import values

SETTINGS = ImageSettings(do_image_splitting=True)
LIMIT = 40_000_000
SMALL = noise_png(40, 30)


def with_pool(
    test: Callable[[ImagePool], Awaitable[None]],
    *,
    workers: int = 1,
    timeout: float = 20.0,
    max_pixels: int = LIMIT,
    metrics: ServerMetrics | None = None,
) -> None:
    """Run `test` with a started pool, and see that the pool leaves no process and no task behind."""

    async def run() -> None:
        counted = metrics or ServerMetrics("m")
        pool = ImagePool(workers, timeout, max_pixels=max_pixels, settings=SETTINGS, metrics=counted)
        await pool.start()
        started = pids(pool)
        assert len(started) == workers
        try:
            async with asyncio.timeout(60):
                await test(pool)
        finally:
            started += pids(pool)
            await pool.close()
        assert not any(alive(pid) for pid in started)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def pids(pool: ImagePool) -> list[int]:
    return [worker._process.pid for worker in pool._workers if worker._process is not None]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def proc(pid: int, name: str) -> bytes:
    return Path(f"/proc/{pid}/{name}").read_bytes()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def error_of(call: Coroutine[Any, Any, object]) -> ClientError:
    with pytest.raises(ClientError) as caught:
        await call
    return caught.value


async def assert_works(pool: ImagePool) -> None:
    assert len(await pool.tiles(SMALL, split=True, param="p")) == 5


@pytest.mark.parametrize("split", [False, True])
def test_tiles_are_those_of_the_plain_functions(split: bool) -> None:
    async def test(pool: ImagePool) -> None:
        for data in (noise_png(1100, 700), encoded(noise(300, 500), "JPEG"), noise_png(1, 9)):
            tiles = await pool.tiles(data, split=split, param="p")
            image = decode_rgb(data, max_pixels=LIMIT)
            assert tiles == tuple(make_tiles(image, split=split, settings=SETTINGS))

    with_pool(test)


def test_refusals_name_the_parameter_and_cost_no_worker() -> None:
    async def test(pool: ImagePool) -> None:
        before = pids(pool)
        for data, code in (
            (b"", "empty_image_file"),
            (b"<svg/>", "invalid_image_format"),
            (SMALL[:200], "image_parse_error"),
            (noise_png(101, 100), "image_too_large"),
        ):
            error = await error_of(pool.tiles(data, split=False, param="messages[0].content[1].image_url.url"))
            assert (error.status, error.code) == (400, code)
            assert error.param == "messages[0].content[1].image_url.url"
            assert error.message
        await assert_works(pool)
        assert pids(pool) == before

    with_pool(test, max_pixels=10_000)


def test_more_images_than_workers() -> None:
    async def test(pool: ImagePool) -> None:
        files = [noise_png(30 + index, 40, seed=index) for index in range(12)]
        results = await asyncio.gather(*(pool.tiles(data, split=False, param="p") for data in files))
        for data, tiles in zip(files, results, strict=True):
            expected = make_tiles(decode_rgb(data, max_pixels=LIMIT), split=False, settings=SETTINGS)
            assert tiles == tuple(expected)

    with_pool(test, workers=2)


def test_a_worker_that_died_while_idle_costs_no_image() -> None:
    async def test(pool: ImagePool) -> None:
        [pid] = pids(pool)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not alive(pid))
        await until(lambda: not pool._workers[0].running)
        await assert_works(pool)
        assert pids(pool) != [pid]

    with_pool(test)


def test_a_worker_killed_at_work_costs_its_image_only() -> None:
    async def test(pool: ImagePool) -> None:
        [pid] = pids(pool)
        os.kill(pid, signal.SIGSTOP)  # holds the image until it is killed
        held = asyncio.create_task(pool.tiles(SMALL, split=True, param="messages[2]"))
        waiting = asyncio.create_task(pool.tiles(SMALL, split=True, param="messages[3]"))
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGKILL)
        error = await error_of(held)  # type: ignore[arg-type]
        assert (error.status, error.code, error.param) == (400, "image_parse_error", "messages[2]")
        assert len(await waiting) == 5
        await assert_works(pool)
        assert not alive(pid)

    with_pool(test)


def test_a_hung_worker_is_replaced_at_the_limit() -> None:
    async def test(pool: ImagePool) -> None:
        [pid] = pids(pool)
        os.kill(pid, signal.SIGSTOP)
        start = time.perf_counter()
        # More than the pipe holds, so that the limit covers the writing too.
        error = await error_of(pool.tiles(SMALL + bytes(4 << 20), split=False, param="messages[0]"))
        assert 0.5 <= time.perf_counter() - start < 15
        assert (error.code, error.param) == ("image_parse_error", "messages[0]")
        assert "0.5 seconds" in error.message
        await assert_works(pool)
        assert not alive(pid)

    with_pool(test, timeout=0.5)


def test_one_hung_worker_of_two_does_not_stop_the_other() -> None:
    async def test(pool: ImagePool) -> None:
        stopped = pids(pool)[0]
        os.kill(stopped, signal.SIGSTOP)
        held = asyncio.create_task(pool.tiles(SMALL, split=False, param="p"))
        await asyncio.sleep(0.05)
        for _ in range(3):
            await assert_works(pool)
        assert not held.done()
        os.kill(stopped, signal.SIGCONT)
        assert len(await held) == 1

    with_pool(test, workers=2)


def test_cancelling_at_work_replaces_the_worker() -> None:
    async def test(pool: ImagePool) -> None:
        [pid] = pids(pool)
        os.kill(pid, signal.SIGSTOP)
        held = asyncio.create_task(pool.tiles(SMALL, split=False, param="p"))
        await asyncio.sleep(0.05)
        held.cancel()
        with pytest.raises(asyncio.CancelledError):
            await held
        # The next answer must be the next image's, not what the cancelled one left in the pipe.
        data = noise_png(60, 50, seed=5)
        expected = make_tiles(decode_rgb(data, max_pixels=LIMIT), split=True, settings=SETTINGS)
        assert await pool.tiles(data, split=True, param="p") == tuple(expected)
        assert not alive(pid)

    with_pool(test)


def test_cancelling_in_the_queue_loses_no_worker() -> None:
    async def test(pool: ImagePool) -> None:
        [pid] = pids(pool)
        os.kill(pid, signal.SIGSTOP)
        held = asyncio.create_task(pool.tiles(SMALL, split=False, param="p"))
        queued = [asyncio.create_task(pool.tiles(SMALL, split=False, param="p")) for _ in range(3)]
        await asyncio.sleep(0.05)
        queued[0].cancel()
        queued[2].cancel()
        os.kill(pid, signal.SIGCONT)
        assert len(await held) == 1
        assert len(await queued[1]) == 1
        await assert_works(pool)
        assert pids(pool) == [pid]

    with_pool(test)


def test_random_cancellation_leaves_the_pool_whole() -> None:
    async def test(pool: ImagePool) -> None:
        for round_number in range(8):
            tasks = [asyncio.create_task(pool.tiles(SMALL, split=True, param="p")) for _ in range(4)]
            await asyncio.sleep(0.004 * round_number)
            for task in tasks[round_number % 2 :: 2]:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(outcome, tuple | asyncio.CancelledError)
        await assert_works(pool)
        await until(lambda: not pool._tasks)
        assert pool._idle.qsize() == 2

    with_pool(test, workers=2)


def test_times_are_counted_apart() -> None:
    metrics = ServerMetrics("m")

    async def test(pool: ImagePool) -> None:
        [pid] = pids(pool)
        start = time.perf_counter()
        os.kill(pid, signal.SIGSTOP)
        calls = [asyncio.create_task(pool.tiles(noise_png(900, 700), split=True, param="p")) for _ in range(2)]
        await asyncio.sleep(0.2)
        os.kill(pid, signal.SIGCONT)
        await asyncio.gather(*calls)
        seconds = time.perf_counter() - start
        found = values(metrics)
        assert [found[f"image_{name}_seconds_count"] for name in ("wait", "decode", "preprocess")] == [2, 2, 2]
        assert 0.2 <= found["image_wait_seconds_sum"] < seconds  # the second's alone
        assert min(found["image_decode_seconds_sum"], found["image_preprocess_seconds_sum"]) > 0.001
        assert found["image_decode_seconds_sum"] + found["image_preprocess_seconds_sum"] < seconds
        await error_of(pool.tiles(SMALL[:200], split=False, param="p"))
        assert values(metrics)["image_decode_seconds_count"] == 2  # not of what failed

    with_pool(test, metrics=metrics)


@pytest.mark.parametrize("decode", [float("nan"), float("inf"), -0.5, 0.75])
def test_times_that_cannot_be_true_are_not_counted(decode: float) -> None:
    """A file that takes a worker over could otherwise spoil a sum for good."""
    metrics = ServerMetrics("m")
    pool = ImagePool(1, 1.0, max_pixels=LIMIT, settings=SETTINGS, metrics=metrics)
    pool._record(Reply(decode_seconds=decode, preprocess_seconds=0.5), 1.0)
    pool._record(Reply(decode_seconds=0.5, preprocess_seconds=decode), 1.0)
    assert values(metrics)["image_decode_seconds_count"] == 0
    pool._record(Reply(decode_seconds=0.5, preprocess_seconds=0.25), 1.0)
    found = values(metrics)
    assert (found["image_decode_seconds_sum"], found["image_preprocess_seconds_sum"]) == (0.5, 0.25)


def test_closing_ends_what_runs_and_what_waits() -> None:
    async def test(pool: ImagePool) -> None:
        for pid in pids(pool):
            os.kill(pid, signal.SIGSTOP)
        calls = [asyncio.create_task(pool.tiles(SMALL, split=False, param="p")) for _ in range(4)]
        await asyncio.sleep(0.05)
        await pool.close()
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, UnavailableError)
        with pytest.raises(UnavailableError):
            await pool.tiles(SMALL, split=False, param="p")

    with_pool(test, workers=2)


def test_closing_right_after_a_failure() -> None:
    async def test(pool: ImagePool) -> None:
        worker = await pool._take()
        pool._give_back(worker, healthy=False)  # its replacement has not taken a step yet
        await pool.close()

    with_pool(test)


def test_the_loop_goes_on_during_a_large_image() -> None:
    data = noise_png(3000, 2500)  # 22 MB
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.002)
            ticks += 1

    async def test(pool: ImagePool) -> None:
        ticker = asyncio.create_task(tick())
        await pool.tiles(data, split=True, param="p")
        ticker.cancel()
        await asyncio.gather(ticker, return_exceptions=True)

    with_pool(test)
    assert ticks >= 20


def test_a_pool_that_cannot_start_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)

    async def test() -> None:
        for executable in (str(broken), str(tmp_path / "none")):
            monkeypatch.setattr(sys, "executable", executable)
            pool = ImagePool(2, 1.0, max_pixels=LIMIT, settings=SETTINGS, metrics=ServerMetrics("m"))
            with pytest.raises(UnavailableError) as caught:
                await pool.start()
            assert caught.value.code == "image_worker_unavailable"
            await pool.close()

    asyncio.run(test())


@contextlib.asynccontextmanager
async def no_worker_can_be_started(pool: ImagePool, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """The one worker dies as well, and two images have found out that there is no other."""
    [pid] = pids(pool)
    with monkeypatch.context() as broken:
        broken.setattr(sys, "executable", "/none")
        os.kill(pid, signal.SIGKILL)
        await until(lambda: not pool._workers[0].running)
        for _ in range(2):  # a try for each image and one more after it, of which the third counts
            with pytest.raises(UnavailableError) as caught:
                await pool.tiles(SMALL, split=False, param="p")
            assert caught.value.code == "image_worker_unavailable"
        yield


def test_workers_that_cannot_be_replaced_make_the_pool_unhealthy_until_one_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(image_pool, "_HEAL_SECONDS", 0.05)

    async def test(pool: ImagePool) -> None:
        assert pool.is_healthy
        async with no_worker_can_be_started(pool, monkeypatch):
            assert not pool.is_healthy
            await asyncio.sleep(0.3)
            assert not pool.is_healthy
        await until(lambda: pool.is_healthy)  # by itself: an unhealthy server is sent no images
        await until(lambda: not pool._tasks)
        [pid] = pids(pool)
        await assert_works(pool)
        assert pids(pool) == [pid]

    with_pool(test)


def test_an_image_that_finds_a_worker_again_makes_the_pool_healthy() -> None:
    async def test(pool: ImagePool) -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            async with no_worker_can_be_started(pool, monkeypatch):
                assert not pool.is_healthy
        await assert_works(pool)
        assert pool.is_healthy

    with_pool(test)


def test_one_failed_start_is_no_illness(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(pool: ImagePool) -> None:
        [pid] = pids(pool)
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", "/none")
            os.kill(pid, signal.SIGSTOP)
            held = asyncio.create_task(pool.tiles(SMALL, split=True, param="p"))
            await asyncio.sleep(0.1)
            os.kill(pid, signal.SIGKILL)
            await error_of(held)  # type: ignore[arg-type]
            await until(lambda: not pool._tasks)
        assert (pool._failed_starts, pool.is_healthy) == (1, True)
        await assert_works(pool)
        assert pool._failed_starts == 0

    with_pool(test)


def test_closing_an_unhealthy_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(pool: ImagePool) -> None:
        async with no_worker_can_be_started(pool, monkeypatch):
            await pool.close()

    with_pool(test)


def test_tiles_are_named_by_this_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A worker that a hostile file has taken over cannot pass its pixels off as those of somebody else's picture."""
    taken_over = tmp_path / "python"
    taken_over.write_text(f"#!{sys.executable}\n{TAKEN_OVER}")
    taken_over.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(taken_over))

    async def test(pool: ImagePool) -> None:
        [tile] = await pool.tiles(SMALL, split=False, param="p")
        pixels = b"\7" * (378 * 378 * 3)
        assert tile == named_tile(378, 378, pixels)
        # Nor can it give fewer than there are.
        assert (await error_of(pool.tiles(SMALL, split=True, param="p"))).code == "image_parse_error"

    with_pool(test)


# A worker of our own for all jobs: a tile of sevens with a key of its choice, one tile where five are wanted.
TAKEN_OVER = """
import sys
import msgspec
def send(reply, pixels=b""):
    message = msgspec.msgpack.encode(reply)
    sys.stdout.buffer.write(len(message).to_bytes(4, "big") + message + pixels)
    sys.stdout.buffer.flush()
send({})
while length := sys.stdin.buffer.read(4):
    job = msgspec.msgpack.decode(sys.stdin.buffer.read(int.from_bytes(length, "big")))
    sys.stdin.buffer.read(job["data_length"])
    tile = {"key": bytes(32), "height": 378, "width": 378}
    send({"tiles": [tile]}, bytes([7]) * (378 * 378 * 3))
"""


# --- the worker itself, over its pipes ---


class Worker:
    def __init__(self, memory_bytes: int = 1 << 30, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server.inputs.image_worker", str(memory_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | environment,
        )
        assert self.receive() == Reply()

    def send(self, data: bytes, *, max_pixels: int = LIMIT) -> Reply:
        message = msgspec.msgpack.encode(
            Job(data_length=len(data), split=False, max_pixels=max_pixels, settings=SETTINGS)
        )
        assert self.process.stdin is not None
        self.process.stdin.write(len(message).to_bytes(4, "big") + message + data)
        self.process.stdin.flush()
        return self.receive()

    def receive(self) -> Reply:
        assert self.process.stdout is not None
        length = int.from_bytes(self.process.stdout.read(4), "big")
        reply = msgspec.msgpack.decode(self.process.stdout.read(length), type=Reply)
        for tile in reply.tiles:
            assert len(self.process.stdout.read(tile.height * tile.width * 3)) == tile.height * tile.width * 3
        return reply

    def finish(self) -> int:
        self.rest, _ = self.process.communicate(timeout=20)
        return self.process.returncode


def test_worker_ignores_interrupts_and_ends_with_its_input() -> None:
    worker = Worker()
    for number in (signal.SIGINT, signal.SIGTERM):
        worker.process.send_signal(number)
    assert len(worker.send(SMALL).tiles) == 1
    assert worker.finish() == 0


def test_worker_ends_when_its_input_breaks_off() -> None:
    worker = Worker()
    message = msgspec.msgpack.encode(Job(data_length=100, split=False, max_pixels=1, settings=SETTINGS))
    assert worker.process.stdin is not None
    worker.process.stdin.write(len(message).to_bytes(4, "big") + message + b"half")
    assert worker.finish() == 0
    assert worker.rest == b""  # half a file is not a picture


def test_worker_survives_its_memory_limit() -> None:
    worker = Worker(memory_bytes=50 << 20)
    reply = worker.send(encoded(noise(16, 16).resize((5000, 5000)), "JPEG"))  # 100 MB of pixels
    assert reply.code == "image_too_large"
    assert len(worker.send(SMALL).tiles) == 1
    assert worker.finish() == 0


def test_worker_has_limits_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDEFICS2_API_KEY", "sk-canary")

    async def test(pool: ImagePool) -> None:
        [pid] = pids(pool)
        limits = proc(pid, "limits").decode()
        [space] = [line.split()[3] for line in limits.splitlines() if line.startswith("Max address space")]
        assert (1 << 30) < int(space) < (4 << 30)
        assert "Max core file size        0 " in limits
        assert b"sk-canary" not in proc(pid, "environ")

    with_pool(test)


def test_worker_gives_memory_back() -> None:
    large = encoded(Image.new("RGBA", (6000, 5000), (1, 2, 3, 4)), "PNG")  # 120 MB as pixels, and more on the way

    async def test(pool: ImagePool) -> None:
        [pid] = pids(pool)
        assert len(await pool.tiles(large, split=True, param="p")) == 5
        assert (await error_of(pool.tiles(large[:-100], split=True, param="p"))).code == "image_parse_error"
        await until(lambda: int(proc(pid, "statm").split()[1]) * resource.getpagesize() < 80 << 20)

    with_pool(test)


def test_worker_imports_little() -> None:
    code = (
        "import server.inputs.image_worker, sys;"
        "print(sorted({'torch', 'numpy', 'pydantic', 'httpx', 'asyncio', 'pickle'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout == "[]\n"
