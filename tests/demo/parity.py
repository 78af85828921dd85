"""The bundled model against transformers, and a batch against single requests: `python -m tests.demo.parity`.

Prints for how many of the exam's questions the answers are the same, token for token. transformers loads the same files
and generates by itself. All is float32 and greedy. The exit status is 1 when any answer differs.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from server.config import ServerConfig
from server.demo.checkpoint import ensure_demo
from server.demo.exam import EXERCISES, MAX_ANSWER_TOKENS, Exercise, Item, draw_items
from server.demo.scenes.talk import NO_PICTURE
from server.engine.core import EngineCore
from server.launch import build_inputs
from server.observability.metrics import ServerMetrics
from server.types import EngineRequest, ImageInput, TextPart, Turn
from tests.engines import drive, real_core
from tests.test_parity import Conversation, Reference, prepare

BATCH = 32
SEED = 7
WITHOUT = Exercise("no picture", [], lambda scene, question: False)


@dataclass(frozen=True)
class Compared:
    """One question's answers as token ids: in a batch of BATCH, alone, and by transformers."""

    exercise: str
    num_pictures: int
    in_batch: list[int]
    alone: list[int]
    theirs: list[int]


def questions(num_pictures: int) -> list[tuple[Exercise, Item]]:
    """Questions about at least so many pictures, in turn of each exercise, and now and then one about none."""
    drawn = {
        exercise.name: draw_items(exercise, 1 + num_pictures // len(EXERCISES), seed=SEED) for exercise in EXERCISES
    }
    found: list[tuple[Exercise, Item]] = []
    for index in itertools.count():
        found.append((WITHOUT, Item([], "What number is this?", NO_PICTURE)))
        for exercise in EXERCISES:
            found.append((exercise, drawn[exercise.name][index]))
            if sum(len(item.pictures) for _, item in found) >= num_pictures:
                return found
    raise AssertionError("not reached")


def conversation(exercise: Exercise, item: Item) -> Conversation:
    pictures = [
        ImageInput(url=f"data:image/png;base64,{base64.b64encode(content).decode()}", detail=exercise.detail, param="")
        for content in item.pictures
    ]
    images = [Image.open(io.BytesIO(content)).convert("RGB") for content in item.pictures]
    turns = (Turn("user", (*pictures, TextPart(item.question))),)
    return Conversation(turns, images, split=exercise.detail == "high")


def engine(folder: Path) -> EngineCore:
    """One whose first step holds a whole batch with its pictures, and that finds nothing of it again."""
    return real_core(
        folder,
        max_num_seqs=BATCH,
        max_num_batched_tokens=BATCH * 512,
        max_num_batched_pixels=BATCH * 5 * 980 * 980,
        encoder_cache_tiles=BATCH * 5,
        kv_cache_memory_gb=0.5,
        enable_prefix_caching=False,
    )


def answers(core: EngineCore, requests: Sequence[EngineRequest], *, together: int) -> list[list[int]]:
    """The tokens of each answer; `together` at once, no more and, but for the last ones, no fewer."""
    found: dict[str, list[int]] = {}
    for start in range(0, len(requests), together):
        found |= drive(core, requests[start : start + together]).tokens
    return [found[request.request_id] for request in requests]


@torch.inference_mode()
def reference_answers(reference: Reference, conversations: Sequence[Conversation]) -> Iterator[list[int]]:
    for asked in conversations:
        inputs = reference.inputs(asked)
        generated = reference.model.generate(**inputs, do_sample=False, max_new_tokens=MAX_ANSWER_TOKENS)
        yield generated[0, inputs["input_ids"].shape[1] :].tolist()


def compare(folder: Path, num_pictures: int) -> list[Compared]:
    """Every question's answers."""
    asked = questions(num_pictures)
    conversations = [conversation(exercise, item) for exercise, item in asked]
    core = engine(folder)
    inputs = build_inputs(ServerConfig(), folder, ServerMetrics("parity"))
    requests = asyncio.run(prepare(inputs, conversations, core.info.max_model_len, max_tokens=MAX_ANSWER_TOKENS))
    in_batch = answers(core, requests, together=BATCH)
    alone = answers(core, requests, together=1)
    theirs = reference_answers(Reference(folder), conversations)
    return [
        Compared(exercise.name, len(item.pictures), *tokens)
        for (exercise, item), *tokens in zip(asked, in_batch, alone, theirs, strict=True)
    ]


def table(compared: Sequence[Compared]) -> str:
    """Markdown: of each exercise how many answers are the same."""
    count = sum(one.num_pictures for one in compared)
    lines = [
        f"| {count} pictures | questions | as transformers' | {BATCH} at once as alone |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name in [*dict.fromkeys(one.exercise for one in compared), "all"]:
        of = [one for one in compared if name in (one.exercise, "all")]
        same = sum(one.in_batch == one.theirs for one in of), sum(one.in_batch == one.alone for one in of)
        lines.append(f"| {name} | {len(of)} | {same[0]} | {same[1]} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=300, help="pictures; default: %(default)s")
    parser.add_argument("--model", type=Path, help="checkpoint; default: the bundled one")
    args = parser.parse_args()
    compared = compare(args.model or ensure_demo(), args.count)
    print(table(compared))
    return 0 if all(one.in_batch == one.alone == one.theirs for one in compared) else 1


if __name__ == "__main__":
    sys.exit(main())
