"""What one client's pictures may tell or cost another: nothing that is kept, named or held."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import time

import pytest
from PIL import Image

from server.inputs import image_fetch, images
from server.inputs.images import ImageLoader
from server.types import ImageInput, Tile
from tests.inputs.loading import SETTINGS, Bench, refusal, tiles_of, with_loader
from tests.inputs.loopback import Seen, answer, raw
from tests.inputs.pictures import as_data_url, encoded, noise, noise_png


def keys(tiles: tuple[Tile, ...]) -> list[bytes]:
    return [tile.key for tile in tiles]


def pixels(tiles: tuple[Tile, ...]) -> list[bytes]:
    return [tile.pixels for tile in tiles]


def test_a_salt_keeps_pictures_apart() -> None:
    data = noise_png(64, 48)
    url = as_data_url(data)

    async def test(bench: Bench) -> None:
        [shared] = await bench.load(url, detail="high")
        assert shared == tiles_of(data, split=True)
        seen = {"": shared}
        for count, salt in enumerate(("alice", "bob", "bo", "b\x00", "\ud800"), 2):
            [tiles] = await bench.load(url, detail="high", salt=salt)
            assert bench.num_decoded == count  # nobody's is found
            assert pixels(tiles) == pixels(shared)
            assert [len(key) for key in keys(tiles)] == [32] * 5
            seen[salt] = tiles
        for one, other in itertools.combinations(seen.values(), 2):
            assert not set(keys(one)) & set(keys(other))  # nor would the engine find it
        for salt, tiles in seen.items():
            assert await bench.load(url, detail="high", salt=salt) == [tiles]
        assert bench.num_decoded == len(seen)

    with_loader({}, test)


def test_a_salt_has_a_frame() -> None:
    """Its end and the file's start are told apart, so that no salt and file look like another salt and file."""
    loader = ImageLoader.__new__(ImageLoader)
    loader._settings_bytes = b"settings"
    contents = [(b"ab", b"c"), (b"a", b"bc"), (b"abc", b""), (b"", b"abc"), (b"ab\x00", b"c"), (b"ab", b"\x00c")]
    made = {loader._content_key(data, split, salt) for salt, data in contents for split in (False, True)}
    assert len(made) == 2 * len(contents)


def test_what_is_cut_otherwise_or_looks_otherwise_has_another_key() -> None:
    image = noise(60, 40)
    turned = image.getexif()
    turned[0x0112] = 6
    grey = image.convert("P")
    files = {
        "whole": as_data_url(encoded(image, "PNG")),
        "turned": as_data_url(encoded(image, "PNG", exif=turned)),
        "of a palette": as_data_url(encoded(grey, "PNG")),
        "in part transparent": as_data_url(encoded(grey, "PNG", transparency=grey.getpixel((0, 0)))),
    }

    async def test(bench: Bench) -> None:
        found = {name: (await bench.load(url))[0] for name, url in files.items()}
        assert len({keys(tiles)[0] for tiles in found.values()}) == len(files)
        [split] = await bench.load(files["whole"], detail="high")
        assert keys(split)[4:] == keys(found["whole"])  # the whole picture is the same whichever way it is asked for
        assert len(set(keys(split))) == 5
        assert bench.num_decoded == len(files) + 1

    with_loader({}, test)


def test_pixels_in_another_shape_are_another_picture() -> None:
    """The same bytes as 400 × 500 and 500 × 400: neither file nor tiles may be taken for each other's."""
    wide = noise(500, 400)
    tall = Image.frombytes("RGB", (400, 500), wide.tobytes())

    async def test(bench: Bench) -> None:
        [[first]] = await bench.load(as_data_url(encoded(wide, "PNG")))
        [[second]] = await bench.load(as_data_url(encoded(tall, "PNG")))
        assert first.pixels == second.pixels
        assert first.key != second.key

    with_loader({}, test)


def test_a_key_has_its_share_of_the_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_fetch, "_SLOW_START_SECONDS", 50.0)

    async def test(bench: Bench) -> None:
        greedy = [asyncio.create_task(bench.load(f"{bench.url}/hang?{i}", key="greedy")) for i in range(40)]
        async with asyncio.timeout(20):
            while bench.server.open_connections < 16:
                await asyncio.sleep(0.01)
        assert len((await bench.load(bench.url + "/x", key="modest"))[0]) == 1
        assert bench.server.most_open_connections == 17
        for task in greedy:
            task.cancel()
        await asyncio.gather(*greedy, return_exceptions=True)
        await bench.server.all_closed()

    with_loader({"/hang": raw(b"HTTP/1.1 200 OK\r\n\r\n"), "/x": answer(noise_png(40, 40))}, test)


def test_data_urls_are_read_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them keeps the event loop waiting for the interpreter; a crowd of them would for as long as all take."""
    data = noise_png(40, 40)
    running: list[str] = []
    most = 0

    def parse(url: str, *, max_bytes: int, param: str) -> bytes:
        nonlocal most
        running.append(url)
        most = max(most, len(running))
        time.sleep(0.01)
        running.remove(url)
        return data

    monkeypatch.setattr(images, "parse_data_url", parse)

    async def test(bench: Bench) -> None:
        await asyncio.gather(*(bench.load(f"data:,{number}", "data:,x") for number in range(10)))
        assert most == 1

    with_loader({}, test)


def test_health_is_the_pools() -> None:
    async def test(bench: Bench) -> None:
        assert bench.loader.is_healthy
        bench.pool._failed_starts = 3
        assert not bench.loader.is_healthy

    with_loader({}, test)


def test_requests_that_are_given_up_leave_nothing_behind() -> None:
    """At any stage: waiting for a download, for a worker, or in one."""
    large = noise_png(600, 400)
    rng = random.Random(0)

    async def slowly(seen: Seen, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.02)
        await answer(large)(seen, writer)

    async def test(bench: Bench) -> None:
        async def one(number: int) -> None:
            urls = [as_data_url(large + b"%d" % number), f"{bench.url}/slow?{number}", f"{bench.url}/missing"]
            task = asyncio.create_task(bench.load(*urls[: number % 3 + 1], detail="high", key=f"key {number % 4}"))
            await asyncio.sleep(rng.random() * 0.2)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        async def settle() -> tuple[int, int]:
            async with asyncio.timeout(30):
                await bench.server.all_closed()
                while bench.pool._tasks or bench.pool._idle.qsize() < 2:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            return len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))

        await asyncio.gather(*(one(number) for number in range(4)))
        before = await settle()
        for round_number in range(10):
            await asyncio.gather(*(one(round_number * 6 + number) for number in range(6)))
        assert await settle() == before
        assert await bench.load(as_data_url(large), detail="high") == [tiles_of(large, split=True)]

    with_loader({"/slow": slowly, "/missing": answer(status="404 Not Found")}, test, cache_bytes=0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_hangs_costs_one_picture(number: signal.Signals) -> None:
    """Two workers; one of them gets a signal in the middle of a picture. The other one goes on meanwhile."""
    data = noise_png(64, 64)

    async def test(bench: Bench) -> None:
        bench.pool._timeout = 2.0
        [victim, other] = [worker._process.pid for worker in bench.pool._workers if worker._process is not None]
        os.kill(victim, signal.SIGSTOP)
        held = asyncio.create_task(bench.load(as_data_url(data + b"0")))
        await asyncio.sleep(0.1)
        os.kill(victim, number)
        for index in range(1, 4):
            assert await bench.load(as_data_url(data + b"%d" % index)) == [tiles_of(data, split=False)]
        error = await refusal(held)
        assert (error.status, error.code, error.param) == (400, "image_parse_error", "images[0]")
        async with asyncio.timeout(20):
            while bench.pool._tasks:
                await asyncio.sleep(0.01)
        now = [worker._process.pid for worker in bench.pool._workers if worker._process is not None]
        assert other in now
        assert len(now) == 2
        assert victim not in now
        assert bench.loader.is_healthy
        more = [ImageInput(as_data_url(data + b"-%d" % index), "low", "p") for index in range(6)]
        assert await bench.loader.load(more) == [tiles_of(data, split=False)] * 6

    with_loader({}, test, settings=SETTINGS)
