"""Send mutated image files through the real pool of decoding processes: `python -m tests.campaigns.fuzz_images`.

Each file must become tiles or a refusal that a client may read, twice the same; no process may be left and nobody may
have kept memory. Prints a table; the exit status is 1 if anything was missed. A file is made again by
`hostile_file(SEED, NUMBER)`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from server.errors import ClientError
from server.inputs.image_pool import ImagePool
from server.observability.metrics import ServerMetrics
from server.types import ImageSettings, Tile
from tests.campaigns.hostile_images import hostile_file, whole_files
from tests.conformance.memory import children

SETTINGS = ImageSettings(do_image_splitting=True)
PARAM = "messages[0].content[0].image_url.url"
CODES = frozenset({"empty_image_file", "invalid_image_format", "image_too_large", "image_parse_error"})
# What a decoder says of a file: addresses, paths, classes, reprs, Python's or a library's own words.
LEAK = re.compile(r"0x[0-9a-fA-F]|/|\\|<|>|object at|\.py|[Ee]rror|[Ee]xception|PIL|libjpeg|errno")

MAX_PIXELS = 40_000_000
TIMEOUT = 10.0
# Of each so many files: how often it is cut in five, and how often it is sent twice.
SPLIT_EVERY, TWICE_EVERY = 8, 50
# Memory is first looked at after so many files of another campaign, as an allocator needs thousands to have seen
# everything; at the end it may be so much more.
WARM_SHARE, MIN_WARM = 5, 300
GROWTH = 1.05


@dataclass
class Report:
    """What a campaign saw. Memory is in bytes."""

    outcomes: Counter[str] = field(default_factory=Counter)
    misses: list[str] = field(default_factory=list)
    num_replaced: int = 0
    seconds: float = 0.0
    slowest: tuple[float, int] = (0.0, 0)  # seconds, number of the file
    memory: dict[str, tuple[int, int]] = field(default_factory=dict)
    num_files: tuple[int, int] = (0, 0)
    num_processes: tuple[int, int] = (0, 0)

    def table(self) -> str:
        count = sum(self.outcomes.values())
        lines = [f"{count} files in {self.seconds:.1f} s, {count / max(self.seconds, 1e-9):.0f} a second"]
        lines += [f"  {outcome:<44} {number:>8}" for outcome, number in sorted(self.outcomes.items())]
        lines.append(f"workers replaced                               {self.num_replaced:>8}")
        lines.append(
            f"slowest file                                   {self.slowest[0]:>8.2f} s, number {self.slowest[1]}"
        )
        for name, (before, after) in self.memory.items():
            lines.append(f"{name + ', resident':<46} {before / 2**20:>8.1f} → {after / 2**20:.1f} MiB")
        lines.append(f"open files of the parent                       {self.num_files[0]:>8} → {self.num_files[1]}")
        lines.append(
            f"processes of the parent, before and after      {self.num_processes[0]:>8} → {self.num_processes[1]}"
        )
        lines += [f"MISS {miss}" for miss in self.misses[:50]]
        lines.append(f"misses                                         {len(self.misses):>8}")
        return "\n".join(lines)


async def run_campaign(count: int, seed: int, *, workers: int = 2) -> Report:
    """Send `count` files, two for each worker at a time."""
    report = Report()
    log = _ReplacementCounter()
    logging.getLogger("server.inputs.image_pool").addHandler(log)
    pool = ImagePool(workers, TIMEOUT, max_pixels=MAX_PIXELS, settings=SETTINGS, metrics=ServerMetrics("fuzz"))
    await pool.start()
    await pool.close()  # the event loop opens a file for its first child, and keeps it
    processes, files = len(children(os.getpid())), _num_files()
    await pool.start()
    try:
        await _send_all(pool, Report(), seed - 1, iter(range(max(MIN_WARM, count // WARM_SHARE))))
        before = await _warm(pool, workers)
        started = time.monotonic()
        numbers = iter(range(count))
        await asyncio.gather(*(_send_all(pool, report, seed, numbers) for _ in range(2 * workers)))
        report.seconds = time.monotonic() - started
        after = await _warm(pool, workers)
    finally:
        await pool.close()
        logging.getLogger("server.inputs.image_pool").removeHandler(log)
    report.num_replaced = log.count
    report.memory = {name: (before[name], after[name]) for name in before}
    report.num_files = files, _num_files()
    report.num_processes = processes, len(children(os.getpid()))
    _judge(report)
    return report


async def _send_all(pool: ImagePool, report: Report, seed: int, numbers: object) -> None:
    for number in numbers:  # type: ignore[attr-defined]
        data = hostile_file(seed, number)
        split = number % SPLIT_EVERY == 0
        started = time.monotonic()
        first = await _outcome(pool, data, split, number, report)
        report.slowest = max(report.slowest, (time.monotonic() - started, number))
        report.outcomes[first.partition(":")[0]] += 1
        # Not what took too long, which another machine or another moment may well decode.
        if number % TWICE_EVERY == 0 and "took longer" not in first:
            second = await _outcome(pool, data, split, number, report)
            if first != second:
                report.misses.append(f"{number}: first {first}, then {second}")


async def _outcome(pool: ImagePool, data: bytes, split: bool, number: int, report: Report) -> str:
    try:
        tiles = await pool.tiles(data, split=split, param=PARAM)
    except ClientError as error:
        if error.code not in CODES or error.status != 400 or error.param != PARAM:
            report.misses.append(f"{number}: {error.status} {error.code} for {error.param}")
        if LEAK.search(error.message):
            report.misses.append(f"{number}: a message that tells too much: {error.message!r}")
        how = ""
        if "could not be decoded" in error.message:
            how = ", worker lost"
        elif "took longer" in error.message:
            how = ", took longer"
        return f"400 {error.code}{how}"
    except Exception as error:
        report.misses.append(f"{number}: {type(error).__name__}: {error}")
        return type(error).__name__
    if not _is_sound(tiles, split):
        report.misses.append(f"{number}: tiles of other numbers or sizes than was promised")
    return "200:" + ",".join(tile.key.hex() for tile in tiles)


def _is_sound(tiles: tuple[Tile, ...], split: bool) -> bool:
    edges = range(SETTINGS.shortest_edge, SETTINGS.longest_edge + 1)
    return len(tiles) == (5 if split else 1) and all(
        tile.height in edges and tile.width in edges and len(tile.pixels) == tile.height * tile.width * 3
        for tile in tiles
    )


async def _warm(pool: ImagePool, workers: int) -> dict[str, int]:
    """Decode every kind of file once in every worker; what the processes hold after it."""
    for data in whole_files():
        for split in (False, True):
            await asyncio.gather(*(pool.tiles(data, split=split, param=PARAM) for _ in range(workers)))
    pids = sorted(worker._process.pid for worker in pool._workers if worker._process is not None)
    held = {"parent": _resident(os.getpid())}
    return held | {f"worker {index}": _resident(pid) for index, pid in enumerate(pids)}


def _judge(report: Report) -> None:
    for name, (before, after) in report.memory.items():
        if after > before * GROWTH:
            report.misses.append(f"{name} holds {after - before} bytes more than before")
    if report.num_files[1] > report.num_files[0]:
        report.misses.append(f"{report.num_files[1] - report.num_files[0]} open files are left")
    if report.num_processes[1] > report.num_processes[0]:
        report.misses.append(f"{report.num_processes[1] - report.num_processes[0]} processes are left")


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _num_files() -> int:
    return len(os.listdir("/proc/self/fd"))


class _ReplacementCounter(logging.Handler):
    """How often the pool said that it replaces a worker."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "replacing it" in record.getMessage()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    logging.getLogger("server.inputs.image_pool").propagate = False  # the table counts what it says
    report = uvloop.run(run_campaign(args.count, args.seed, workers=args.workers))
    print(report.table())
    return 1 if report.misses else 0


if __name__ == "__main__":
    sys.exit(main())
