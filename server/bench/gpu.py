"""The engine on a GPU, held against what the GPU allows: one command that makes the rows of BENCHMARKS.md.

`python -m server.bench.gpu MODEL` loads MODEL's shape with random weights once for each variant, and measures its
steps without HTTP: decodes alone and many, a prompt, a split picture, and the workload of the model's card. With
`--device cpu` and smaller numbers the command can be tried where there is no GPU.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.bench.steps import ROWS_PER_TILE, answer_len, decode, end, prefill, text_request
from server.config import ServerConfig
from server.engine.core import EngineCore
from server.launch import build_core
from server.model.config import ModelConfig, load_model_config
from server.model.costs import prefill_flops, step_weights
from server.runner.ceilings import copy_bandwidth, device_name, matrix_flops, peak_gpu_bytes
from server.runner.hardware import choose_device, choose_dtype
from server.types import PlaceholderRange, Tile

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "without graphs": {"cuda_graphs": False},
    "SDPA": {"attention_backend": "sdpa"},
}
# The card's example asks about two pictures; 20 generations in 13.3 s leave time for about 20 tokens each.
CARD_PICTURES = 2
CARD_TOKENS = 20
CARD_WORDS = 40


@dataclass(frozen=True)
class Ceilings:
    """`copied` in bytes a second, `multiplied` in operations a second; `itemsize` is of the model's numbers."""

    copied: float
    multiplied: float
    itemsize: int


@dataclass(frozen=True)
class Row:
    """One line: what is timed, and the seconds that the ceilings would allow for it, if they are to be compared."""

    name: str
    run: Callable[[EngineCore], float]
    ideal_seconds: float | None = None


def main() -> int:
    args = _parse()
    config = load_model_config(args.model)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    ceilings = Ceilings(copy_bandwidth(device), matrix_flops(device, dtype), dtype.itemsize)
    print(
        f"{device_name()}; {str(dtype).removeprefix('torch.')}; copies {ceilings.copied / 1e9:.0f} GB/s; multiplies "
        f"{ceilings.multiplied / 1e12:.1f} TFLOP/s; medians of {args.rounds}"
    )
    rows = _rows(args, config, ceilings)
    cells: dict[str, list[str]] = {row.name: [] for row in rows}
    memory = []
    for name in args.variants:
        core = _build(args, VARIANTS[name])
        for row in rows:
            cells[row.name].append(_measure(row, core, args.rounds))
        memory.append(f"{peak_gpu_bytes() / 2**30:.1f}")
        del core
        gc.collect()
    print("| milliseconds (share of what the GPU allows) | " + " | ".join(args.variants) + " |")
    print("| --- |" + " --- |" * len(args.variants))
    for row_name, found in {**cells, "GiB at the most, KV cache included": memory}.items():
        print(f"| {row_name} | " + " | ".join(found) + " |")
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m server.bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder with a config.json; weights are not needed")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=64, help="decodes at once (default: 64)")
    parser.add_argument("--context", type=int, default=1024, help="tokens before them (default: 1024)")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens of a prompt (default: 4096)")
    parser.add_argument("--edge", type=int, default=980, help="of each tile in pixels (default: 980)")
    parser.add_argument("--generations", type=int, default=20, help="of the card's workload (default: 20)")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--steps", type=int, default=32, help="decode steps a round (default: 32)")
    parser.add_argument("--kv-cache-memory-gb", type=float, default=20.0, help="default: 20")
    return parser.parse_args()


def _build(args: argparse.Namespace, settings: dict[str, Any]) -> EngineCore:
    answers = answer_len(args.batch, args.context, args.steps)
    card = 5 * CARD_PICTURES * (ROWS_PER_TILE + 2) + CARD_WORDS + CARD_TOKENS
    config = ServerConfig.model_validate(
        {
            "model": str(args.model),
            "load_format": "dummy",
            "device": args.device,
            "dtype": args.dtype,
            "max_num_seqs": max(args.batch, args.generations),
            "max_model_len": max(args.context + answers, args.prompt, card) + 64,
            "max_num_batched_tokens": max(4096, args.prompt),
            "max_num_batched_pixels": 5 * args.edge**2,
            "kv_cache_memory_gb": args.kv_cache_memory_gb,
            "enable_prefix_caching": False,
            **settings,
        }
    )
    return build_core(config, args.model)


def _rows(args: argparse.Namespace, config: ModelConfig, ceilings: Ceilings) -> list[Row]:
    text = config.text
    weights = step_weights(config) * ceilings.itemsize
    cached = 2 * text.num_layers * text.num_kv_heads * text.head_dim * ceilings.itemsize  # a token
    many = weights + args.batch * args.context * cached
    return [
        Row("a token of 1 answer", lambda core: decode(core, 1, 16, args.steps), weights / ceilings.copied),
        Row(
            f"a token of each of {args.batch} at {args.context} of context",
            lambda core: decode(core, args.batch, args.context, args.steps),
            many / ceilings.copied,
        ),
        Row(
            f"a prompt of {args.prompt}",
            lambda core: prefill(core, args.prompt),
            prefill_flops(config, args.prompt) / ceilings.multiplied,
        ),
        Row(f"5 tiles of {args.edge}×{args.edge}", lambda core: _encode(core, args.edge, 5)),
        Row(
            f"the card's {args.generations} generations at once, split",
            lambda core: _generate(core, args, tiles_per_picture=5),
        ),
        Row(
            f"the card's {args.generations} generations at once, not split",
            lambda core: _generate(core, args, tiles_per_picture=1),
        ),
    ]


def _measure(row: Row, core: EngineCore, rounds: int) -> str:
    row.run(core)  # kernels are compiled for new shapes
    seconds = statistics.median(row.run(core) for _ in range(rounds))
    share = "" if row.ideal_seconds is None else f" ({row.ideal_seconds / seconds:.0%})"
    return f"{1e3 * seconds:.2f}{share}"


def _encode(core: EngineCore, edge: int, count: int) -> float:
    """Seconds from a picture of `count` tiles to the first token after it, its few words included."""
    return _until_done(core, [_pictured(edge, count, words=8, max_tokens=1)])


def _generate(core: EngineCore, args: argparse.Namespace, *, tiles_per_picture: int) -> float:
    """Seconds of so many answers, asked for at once."""
    tiles = CARD_PICTURES * tiles_per_picture
    requests = [_pictured(args.edge, tiles, words=CARD_WORDS, max_tokens=CARD_TOKENS) for _ in range(args.generations)]
    return _until_done(core, requests)


def _pictured(edge: int, count: int, *, words: int, max_tokens: int) -> Any:
    def picture() -> Tile:
        pixels = os.urandom(edge * edge * 3)
        return Tile(pixels[:32], edge, edge, pixels)

    return text_request(
        1 + count * ROWS_PER_TILE + words,
        max_tokens=max_tokens,
        tiles=tuple(picture() for _ in range(count)),
        placeholders=tuple(PlaceholderRange(1 + index * ROWS_PER_TILE, ROWS_PER_TILE) for index in range(count)),
    )


def _until_done(core: EngineCore, requests: list[Any]) -> float:
    started = time.perf_counter()
    for request in requests:
        core.handle(request)
    while core.scheduler.has_work:
        core.step()
    seconds = time.perf_counter() - started
    end(core, requests)
    return seconds


if __name__ == "__main__":
    sys.exit(main())
