"""What a constrained answer costs those who share its batch: step times with and without it, in turn.

`python -m server.bench.constrained MODEL --batch 8 --constrained 1` drives an engine without HTTP. Each round decodes a
batch of free answers, then the same batch with some of them held to a JSON schema; what is compared are medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

from server.config import ServerConfig
from server.engine.core import EngineCore
from server.launch import build_core
from server.types import EngineRequest, GrammarSpec, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "merchant": {"type": "string"},
        "date": {"type": "string", "format": "date"},
        "items": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "quantity": {"type": "integer", "minimum": 1},
                    "price": {"type": "number"},
                    "tax": {"enum": ["none", "reduced", "full"]},
                },
                "required": ["name", "price"],
                "additionalProperties": False,
            },
        },
        "total": {"type": "number"},
    },
    "required": ["merchant", "items", "total"],
    "additionalProperties": False,
}
PROMPT_TOKENS = 64
WARMUP_STEPS = 4

_ids = itertools.count()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m server.bench.constrained", description=__doc__)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--batch", type=int, default=8, help="answers at once (default: 8)")
    parser.add_argument("--constrained", type=int, default=1, help="how many of them have a schema (default: 1)")
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    parser.add_argument("--steps", type=int, default=40, help="steps of a round (default: 40)")
    args = parser.parse_args()
    config = ServerConfig.model_validate(
        {"max_num_seqs": args.batch, "max_model_len": 1024, "kv_cache_memory_gb": 1.0, "enable_prefix_caching": False}
    )
    core = build_core(config, args.model)
    free, mixed = [], []
    _round(core, args.batch, 0, args.steps)
    for _ in range(args.rounds):
        free.append(_round(core, args.batch, 0, args.steps))
        mixed.append(_round(core, args.batch, args.constrained, args.steps))
    ratios = [after / before for before, after in zip(free, mixed, strict=True)]
    print(
        f"{args.batch} free answers: {statistics.median(free) * 1e3:.2f} ms a step; with {args.constrained} of them "
        f"constrained: {statistics.median(mixed) * 1e3:.2f} ms; ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f})"
    )
    return 0


def _round(core: EngineCore, batch: int, constrained: int, steps: int) -> float:
    """Median seconds of a step in which all answers grow by a token."""
    requests = [_request(index, is_constrained=index < constrained, max_tokens=steps) for index in range(batch)]
    for request in requests:
        core.handle(request)
    while core.scheduler.num_waiting:
        _take_messages(core)
        if core.scheduler.has_work:
            core.step()
        else:
            time.sleep(0.001)  # a grammar is being compiled
    seconds = []
    while core.scheduler.num_running == batch:
        started = time.perf_counter()
        outputs = core.step().outputs
        if len(outputs) == batch:
            seconds.append(time.perf_counter() - started)
    core.scheduler.abort([request.request_id for request in requests])
    core.executor.forget(core.scheduler.take_finished())
    if len(seconds) <= WARMUP_STEPS:
        raise SystemExit("an answer ended too early to measure anything")
    return statistics.median(seconds[WARMUP_STEPS:])


def _take_messages(core: EngineCore) -> None:
    while not core.inbox.empty():
        core.handle(core.inbox.get())


def _request(index: int, *, is_constrained: bool, max_tokens: int) -> EngineRequest:
    return EngineRequest(
        request_id=f"r{next(_ids)}",
        prompt_token_ids=[1, *range(600 + index, 600 + index + PROMPT_TOKENS)],
        sampling=SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0,
            seed=index,
            ignore_eos=True,
            grammar=GrammarSpec("json_schema", json.dumps(SCHEMA)) if is_constrained else None,
        ),
        eos_token_ids=(2, 32002),
    )


if __name__ == "__main__":
    sys.exit(main())
