from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Literal

import pytest

from server.inputs import image_fetch
from server.types import ImageDetail, ImageInput, ImageSettings
from tests.inputs.loading import Bench, refusal, tiles_of, with_loader
from tests.inputs.loopback import Seen, answer, raw
from tests.inputs.pictures import as_data_url, noise_png


def test_tiles_come_in_the_order_of_the_images() -> None:
    files = [noise_png(30 + index, 50, seed=index) for index in range(4)]

    async def slow(seen: Seen, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)  # the first image arrives last
        await answer(files[0])(seen, writer)

    async def test(bench: Bench) -> None:
        urls = [bench.url + "/slow", as_data_url(files[1]), bench.url + "/fast", as_data_url(files[3])]
        assert await bench.load(*urls) == [tiles_of(data, split=False) for data in files]
        assert (bench.count("image_fetch_seconds_count"), bench.num_decoded) == (2, 4)
        assert bench.count("image_fetch_seconds_sum") >= 0.2

    with_loader({"/slow": slow, "/fast": answer(files[2])}, test)


def test_no_images() -> None:
    async def test(bench: Bench) -> None:
        assert await bench.load() == []

    with_loader({}, test)


@pytest.mark.parametrize(
    ("splitting", "checkpoint", "auto"),
    [("auto", True, 5), ("auto", False, 1), ("on", False, 5), ("off", True, 1)],
)
def test_detail_decides_on_splitting(splitting: Literal["auto", "on", "off"], checkpoint: bool, auto: int) -> None:
    data = noise_png(60, 40)
    counts: dict[ImageDetail, int] = {"low": 1, "high": 5, "auto": auto}

    async def test(bench: Bench) -> None:
        images = [ImageInput(as_data_url(data), detail, "p") for detail in counts]
        loaded = await bench.loader.load(images)
        for image, tiles in zip(images, loaded, strict=True):
            assert len(tiles) == bench.loader.num_tiles(image) == counts[image.detail]
            assert tiles == tiles_of(data, split=len(tiles) == 5)

    with_loader({}, test, splitting=splitting, settings=ImageSettings(do_image_splitting=checkpoint))


def test_a_url_is_fetched_once_and_decoded_once() -> None:
    data = noise_png(64, 64)

    async def test(bench: Bench) -> None:
        loaded = await bench.load(*[bench.url + "/x"] * 20)
        assert loaded == [tiles_of(data, split=False)] * 20
        assert bench.server.connections == 1
        assert (bench.count("image_fetch_seconds_count"), bench.num_decoded) == (1, 1)
        both = [ImageInput(bench.url + "/x", detail, "p") for detail in ("high", "low")]
        assert [len(tiles) for tiles in await bench.loader.load(both)] == [5, 1]
        assert bench.server.connections == 2  # once a call: what it leads to may have changed

    with_loader({"/x": answer(data)}, test)


def test_a_picture_seen_before_is_not_decoded_again() -> None:
    data = noise_png(64, 64)

    async def test(bench: Bench) -> None:
        [first] = await bench.load(as_data_url(data))
        [again] = await bench.load(as_data_url(data))
        [fetched] = await bench.load(bench.url + "/x")  # the same file from elsewhere
        assert first == again == fetched == tiles_of(data, split=False)
        assert bench.num_decoded == 1
        [split] = await bench.load(as_data_url(data), detail="high")
        assert split == tiles_of(data, split=True)
        assert bench.num_decoded == 2

    with_loader({"/x": answer(data)}, test)


def test_a_url_whose_content_changes_is_not_answered_from_memory() -> None:
    files = [noise_png(40, 40, seed=seed) for seed in (1, 2)]
    turns = iter(files)

    async def changing(seen: Seen, writer: asyncio.StreamWriter) -> None:
        await answer(next(turns))(seen, writer)

    async def test(bench: Bench) -> None:
        for data in files:
            assert await bench.load(bench.url + "/x") == [tiles_of(data, split=False)]

    with_loader({"/x": changing}, test)


@pytest.mark.parametrize("cache_bytes", [0, 1_000_000])
def test_the_memory_is_bounded_in_bytes(cache_bytes: int) -> None:
    # A tile of 378 × 378 pixels takes 428 652 bytes: two fit in a million.
    urls = [as_data_url(noise_png(40, 40, seed=seed)) for seed in range(3)]

    async def test(bench: Bench) -> None:
        for url in (urls[0], urls[1], urls[0], urls[2]):  # the third visit makes the second picture the oldest
            await bench.load(url)
        decoded = bench.num_decoded
        assert decoded == (3 if cache_bytes else 4)
        await bench.load(urls[0])
        await bench.load(urls[2])
        assert bench.num_decoded - decoded == (0 if cache_bytes else 2)
        decoded = bench.num_decoded
        await bench.load(urls[1])
        assert bench.num_decoded - decoded == 1
        await bench.load(urls[2], detail="high")  # five tiles are more than all there is: not kept, nothing lost
        decoded = bench.num_decoded
        await bench.load(urls[1])
        assert bench.num_decoded - decoded == (0 if cache_bytes else 1)

    with_loader({}, test, cache_bytes=cache_bytes)


def test_images_of_a_request_are_fetched_at_once() -> None:
    data = noise_png(40, 40)
    everybody = asyncio.Barrier(3)

    async def together(seen: Seen, writer: asyncio.StreamWriter) -> None:
        await everybody.wait()
        await answer(data)(seen, writer)

    async def test(bench: Bench) -> None:
        loaded = await bench.load(*(f"{bench.url}/x?{index}" for index in range(3)))
        assert loaded == [tiles_of(data, split=False)] * 3

    with_loader({"/x": together}, test)


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ("data:image/png;base64,!", "invalid_base64_image"),
        ("data:image/png;base64,AAAA", "invalid_image_format"),
        ("data:image/png;base64,", "empty_image_file"),
        ("DATA:;base64," + "A" * 1_500_000, "image_file_too_large"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("http://10.0.0.1/", "invalid_image_url"),
        ("{url}/missing", "failed_to_download_image"),
        ("{url}/corrupt", "image_parse_error"),
    ],
)
def test_errors_name_the_image(bad: str, code: str) -> None:
    data = noise_png(40, 40)

    async def test(bench: Bench) -> None:
        good = as_data_url(data)
        error = await refusal(bench.load(good, good, bad.replace("{url}", bench.url), good))
        assert (error.status, error.code, error.param) == (400, code, "images[2]")
        assert len(error.message) < 200
        assert await bench.load(good) == [tiles_of(data, split=False)]

    with_loader({"/missing": answer(status="404 Not Found"), "/corrupt": answer(data[:100])}, test)


def test_the_first_failure_ends_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_fetch, "_SLOW_START_SECONDS", 50.0)

    async def test(bench: Bench) -> None:
        start = time.perf_counter()
        slow = [f"{bench.url}/slow?{index}" for index in range(3)]
        error = await refusal(bench.load(*slow, bench.url + "/missing"))
        assert (error.code, error.param) == ("failed_to_download_image", "images[3]")
        assert time.perf_counter() - start < 5  # the slow ones would take the fetcher's ten seconds
        await bench.server.all_closed()

    handlers = {"/missing": answer(status="404 Not Found"), "/slow": raw(b"HTTP/1.1 200 OK\r\n\r\n")}
    with_loader(handlers, test)


def test_two_failures_are_one_error() -> None:
    async def test(bench: Bench) -> None:
        error = await refusal(bench.load(*["data:;base64,!"] * 2, "data:;base64,?", "file:///x"))
        assert error.param in ("images[0]", "images[2]", "images[3]")

    with_loader({}, test)


def test_what_is_counted() -> None:
    data = noise_png(64, 64)

    async def test(bench: Bench) -> None:
        await bench.load()
        assert bench.count("images_per_request_count") == 0  # a text is no request with images
        inline = as_data_url(data)
        await bench.load(inline, inline, "DATA" + inline[4:], bench.url + "/x", bench.url + "/x")
        await bench.load(inline)
        for bad, code in (
            ("data:;base64,!", "invalid_base64_image"),
            (bench.url + "/none", "failed_to_download_image"),
        ):
            await refusal(bench.load(bad))
            assert bench.count(f"image_errors_total{{code={code}}}") == 1
        assert bench.count("images_total{source=data}") == 4  # as many as a request names, not as were decoded
        assert bench.count("images_total{source=http}") == 2
        assert (bench.count("images_per_request_count"), bench.count("images_per_request_sum")) == (2, 6)
        assert bench.count("image_fetch_seconds_count") == 1  # not of what failed
        queries, hits = bench.count("image_cache_queries_total"), bench.count("image_cache_hits_total")
        assert queries == 2  # each file of a request once
        assert hits == queries - bench.num_decoded >= 1

    with_loader({"/x": answer(data), "/none": answer(status="404 Not Found")}, test)


def test_cancelling_a_request_leaves_everything_usable() -> None:
    data = noise_png(900, 900)
    arrived = asyncio.Event()

    async def hang(seen: Seen, writer: asyncio.StreamWriter) -> None:
        arrived.set()
        await asyncio.sleep(60)

    async def test(bench: Bench) -> None:
        urls: Sequence[str] = [as_data_url(data), bench.url + "/hang"]
        task = asyncio.create_task(bench.load(*urls, detail="high"))
        await arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await bench.server.all_closed()
        assert await bench.load(as_data_url(data), detail="high") == [tiles_of(data, split=True)]

    with_loader({"/hang": hang}, test, max_bytes=16 << 20)
