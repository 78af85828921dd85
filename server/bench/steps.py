"""What the engine's steps cost without HTTP: a token of text at several batch sizes, a prompt, a tile.

`python -m server.bench.steps MODEL --variant dtype=float32 --variant dtype=float32,quantization=int8` loads a core for
each variant (settings of the server; `plain` leaves the matrices unpacked) and measures them in turn, round by round,
so that what the machine does besides falls on all of them alike. Ratios are to the first variant, by round.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.config import ServerConfig
from server.engine.core import EngineCore
from server.launch import build_core
from server.runner.ceilings import read_bandwidth
from server.types import EngineRequest, PlaceholderRange, SamplingParams, Tile

WARMUP_STEPS = 4
ROWS_PER_TILE = 64
CHUNK = 128  # tokens of prompts that a step computes at the least

_ids = itertools.count()


@dataclass(frozen=True)
class Variant:
    """A core and what it is called in the table."""

    name: str
    core: EngineCore


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m server.bench.steps", description=__doc__)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--variant", action="append", default=[], metavar="KEY=VALUE,...", help="settings; `plain`")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32], help="decodes at once (default: 1 8 32)")
    parser.add_argument("--context", type=int, default=256, help="tokens before the first decode (default: 256)")
    parser.add_argument("--prompt", type=int, nargs="*", default=[1024], help="lengths of prompts (default: 1024)")
    parser.add_argument("--tile", type=int, nargs="*", default=[490, 980], help="edges of tiles (default: 490 980)")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--steps", type=int, default=24, help="decode steps a round (default: 24)")
    args = parser.parse_args()
    variants = [_load(args, text) for text in args.variant or [""]]
    jobs: dict[str, Any] = {
        **{f"decode, {n} at once": lambda core, n=n: decode(core, n, args.context, args.steps) for n in args.batch},
        **{f"prompt of {n}": lambda core, n=n: prefill(core, n) for n in args.prompt},
        **{f"tile of {n}×{n}": lambda core, n=n: tile(core, n) for n in args.tile},
    }
    print(f"{args.model}; {os.cpu_count()} cores; reading memory {read_bandwidth() / 1e9:.1f} GB/s")
    print("| milliseconds | " + " | ".join(variant.name for variant in variants) + " |")
    print("| --- |" + " --- |" * len(variants))
    for name, job in jobs.items():
        print(_row(name, job, variants, args.rounds), flush=True)
    return 0


def _load(args: argparse.Namespace, text: str) -> Variant:
    settings: dict[str, Any] = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
    answers = answer_len(max([1, *args.batch]), args.context, args.steps)
    longest = max([args.context + answers, ROWS_PER_TILE, *args.prompt]) + 64
    config = ServerConfig.model_validate(
        {
            "max_num_seqs": max([1, *args.batch]),
            "max_model_len": longest,
            "kv_cache_memory_gb": 2.0,
            "enable_prefix_caching": False,
            **settings,
        }
    )
    core = build_core(config, args.model, pack_weights="plain" not in text.split(","))
    return Variant(text or "default", core)


def _row(name: str, job: Any, variants: list[Variant], rounds: int) -> str:
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for number in range(rounds):
        for variant in variants if number % 2 == 0 else reversed(variants):
            seconds[variant.name].append(job(variant.core))
    first = seconds[variants[0].name]
    cells = []
    for variant in variants:
        own = seconds[variant.name]
        ratios = [before / after for before, after in zip(first, own, strict=True)]
        faster = f" ({statistics.median(ratios):.2f}×)" if variant is not variants[0] else ""
        cells.append(f"{statistics.median(own) * 1e3:.1f}{faster}")
    return f"| {name} | " + " | ".join(cells) + " |"


def decode(core: EngineCore, batch: int, context: int, steps: int) -> float:
    """Median seconds of a step in which each of `batch` answers grows by a token."""
    # Those that are admitted first grow while the others' prompts are computed: all have enough left after that.
    requests = [text_request(context, max_tokens=answer_len(batch, context, steps)) for _ in range(batch)]
    for request in requests:
        core.handle(request)
    while core.scheduler.num_waiting:
        core.step()
    seconds: list[float] = []
    while core.scheduler.num_running == batch and len(seconds) < steps + WARMUP_STEPS:
        started = time.perf_counter()
        if len(core.step().outputs) == batch:
            seconds.append(time.perf_counter() - started)
    end(core, requests)
    return statistics.median(seconds[WARMUP_STEPS:])


def answer_len(batch: int, context: int, steps: int) -> int:
    """Tokens that each of `batch` answers needs so that all of them still grow when the last prompt is computed."""
    return WARMUP_STEPS + steps + batch * (1 + context // CHUNK)


def prefill(core: EngineCore, length: int) -> float:
    """Seconds from a prompt to its first token, in as many steps as the budget makes of it."""
    request = text_request(length, max_tokens=2)
    return _until_first_token(core, request)


def tile(core: EngineCore, edge: int) -> float:
    """Seconds that encoding one tile takes, in as many steps as the budget makes of it."""
    pixels = os.urandom(edge * edge * 3)
    picture = Tile(pixels[:32], edge, edge, pixels)
    request = text_request(
        ROWS_PER_TILE + 8, max_tokens=2, tiles=(picture,), placeholders=(PlaceholderRange(1, ROWS_PER_TILE),)
    )
    core.handle(request)
    seconds = 0.0
    while True:
        stats = core.step().stats
        if not stats.num_tile_shares:
            break
        seconds += stats.encode_seconds
    end(core, [request])
    return seconds


def _until_first_token(core: EngineCore, request: EngineRequest) -> float:
    core.handle(request)
    started = time.perf_counter()
    while not any(output.new_token_ids for output in core.step().outputs):
        pass
    seconds = time.perf_counter() - started
    end(core, [request])
    return seconds


def end(core: EngineCore, requests: list[EngineRequest]) -> None:
    """Let go of requests, whether they have ended or not."""
    core.scheduler.abort([request.request_id for request in requests])
    core.executor.forget(core.scheduler.take_finished())


def text_request(length: int, *, max_tokens: int, **pictures: Any) -> EngineRequest:
    """A greedy request of its own tokens, which no other begins with; `pictures` are its tiles and their places."""
    number = next(_ids)
    return EngineRequest(
        request_id=f"r{number}",
        prompt_token_ids=[1, *((number + index) % 20000 + 100 for index in range(length - 1))],
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        eos_token_ids=(),
        **pictures,
    )


if __name__ == "__main__":
    sys.exit(main())
