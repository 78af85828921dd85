"""How often greedy answers differ between settings that should not matter: types of numbers, packed weights, batches.

`python -m server.bench.agreement --variant plain,dtype=float32 --variant dtype=bfloat16` asks the bundled model, or the
one in `--model`, about pictures that training never saw, once for each variant (settings of the server; `plain` leaves
the matrices unpacked, `alone` asks one after another), and compares the answers with those of the first.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from server.config import ServerConfig
from server.demo.checkpoint import ensure_demo
from server.demo.exam import EXERCISES, draw_items
from server.engine.core import EngineCore
from server.launch import build_core, build_inputs
from server.observability.metrics import ServerMetrics
from server.types import ChatInput, EngineRequest, ImageInput, SamplingParams, TextPart, TokenLogprobs, Turn

MAX_TOKENS = 48


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """Of one answer from the reference's: where it parts, how near the two best were there, and how far numbers were.

    `parts_at` is None for equal answers; `lead` is what the reference's token had over its second, in nats; `drift` are
    the differences of the same tokens' log-probabilities up to there.
    """

    parts_at: int | None
    lead: float | None
    drift: list[float]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m server.bench.agreement",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, help="folder; default: the bundled model")
    parser.add_argument("--variant", action="append", required=True, metavar="KEY=VALUE,...")
    parser.add_argument("--questions", type=int, default=20, help="of each kind of picture (default: 20)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    folder = args.model or ensure_demo()
    requests = asyncio.run(_requests(folder, args.questions, args.seed))
    found = [_ask(folder, variant, requests) for variant in args.variant]
    print(f"{folder.name}: {len(requests)} greedy answers of {sum(len(a.tokens) for a in found[0])} tokens")
    print("| against " + args.variant[0] + " | answers that differ | lead where they part, nats | drift, nats |")
    print("| --- | --- | --- | --- |")
    for variant, answers in zip(args.variant[1:], found[1:], strict=True):
        print(_row(variant, [compare(*pair) for pair in zip(found[0], answers, strict=True)]))
    return 0


async def _requests(folder: Path, count: int, seed: int) -> list[EngineRequest]:
    """Questions of the demo model's exam, as the engine gets them."""
    inputs = build_inputs(ServerConfig.model_validate({}), folder, ServerMetrics("agreement", compat="none"))
    await inputs.start()
    try:
        requests = []
        for exercise in EXERCISES:
            for number, item in enumerate(draw_items(exercise, count, seed=seed)):
                urls = ["data:image/png;base64," + base64.b64encode(picture).decode() for picture in item.pictures]
                pictures = [ImageInput(url=url, detail=exercise.detail, param="picture") for url in urls]
                chat = ChatInput(
                    request_id=f"{exercise.name} {number}",
                    turns=(Turn("user", (*pictures, TextPart(item.question))),),
                    sampling=SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, num_logprobs=2),
                )
                requests.append(await inputs.process(chat, max_model_len=4096))
        return requests
    finally:
        await inputs.close()


def _ask(folder: Path, variant: str, requests: Sequence[EngineRequest]) -> list[Answer]:
    words = variant.split(",")
    settings = dict(part.split("=", 1) for part in words if "=" in part)
    config = ServerConfig.model_validate({"max_model_len": 4096, "kv_cache_memory_gb": 0.5, **settings})
    core = build_core(config, folder, pack_weights="plain" not in words)
    groups = [[request] for request in requests] if "alone" in words else [requests]
    answers: dict[str, Answer] = {request.request_id: Answer() for request in requests}
    for group in groups:
        _drive(core, group, answers)
    return list(answers.values())


def _drive(core: EngineCore, requests: Sequence[EngineRequest], answers: dict[str, Answer]) -> None:
    for request in requests:
        core.handle(request)
    while core.scheduler.has_work:
        for output in core.step().outputs:
            answers[output.request_id].tokens += output.new_token_ids
            answers[output.request_id].logprobs += output.logprobs


def compare(reference: Answer, other: Answer) -> Difference:
    """Up to the first token that is another, or that one of them does not have."""
    common = 0
    for mine, its in zip(reference.tokens, other.tokens, strict=False):
        if mine != its:
            break
        common += 1
    pairs = zip(reference.logprobs[:common], other.logprobs[:common], strict=True)
    drift = [abs(mine.logprob - its.logprob) for mine, its in pairs]
    if reference.tokens == other.tokens:
        return Difference(None, None, drift)
    lead = None
    if common < len(reference.logprobs):
        (_, first), (_, second) = reference.logprobs[common].top[:2]
        lead = first - second
    return Difference(common, lead, drift)


def _row(variant: str, found: Sequence[Difference]) -> str:
    parted = [difference for difference in found if difference.parts_at is not None]
    leads = [difference.lead for difference in parted if difference.lead is not None]
    drift = [value for difference in found for value in difference.drift]
    lead = f"median {statistics.median(leads):.2g}, most {max(leads):.2g}" if leads else "-"
    return (
        f"| {variant} | {len(parted)} of {len(found)} ({len(parted) / len(found):.1%}) | {lead} | "
        f"median {statistics.median(drift):.1e}, most {max(drift):.1e} |"
    )


if __name__ == "__main__":
    sys.exit(main())
