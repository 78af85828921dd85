"""What the demo model is judged by: pictures and typefaces that training never saw, asked about through the engine.

Every answer must be right to the letter.
"""

from __future__ import annotations

import asyncio
import base64
import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from server.config import load_config
from server.demo.curriculum import LONGEST, SHORTEST
from server.demo.scenes.figures import figures
from server.demo.scenes.ledgers import page, receipt, table
from server.demo.scenes.pairs import compare
from server.demo.scenes.studio import Painter, Question, Scene, Studio
from server.demo.scenes.texts import lines, one_number, one_word
from server.demo.typefaces import held_out_typefaces
from server.launch import build_llm
from server.llm import AsyncLLM
from server.types import ChatInput, ImageDetail, ImageInput, SamplingParams, TextPart, Turn

MAX_ANSWER_TOKENS = 64
IN_FLIGHT = 32


@dataclass(frozen=True)
class Exercise:
    """A row of the table: who draws, which of the questions count, and the detail that the pictures are sent with.

    The sides of pictures are `scale` times those of tiles, which are `shortest` or longer. `asks` picks questions by
    task and answer.
    """

    name: str
    painters: Sequence[Painter]
    asks: Callable[[Scene, Question], bool]
    detail: ImageDetail = "low"
    scale: int = 1
    shortest: int = SHORTEST


@dataclass(frozen=True)
class Item:
    """A question about PNG files, and its answer."""

    pictures: Sequence[bytes]
    question: str
    answer: str


def _task(*names: str) -> Callable[[Scene, Question], bool]:
    return lambda _, question: question.task in names


def _single_figure(scene: Scene, question: Question) -> bool:
    return question.task in ("shape", "color")


def _to_five(_: Scene, question: Question) -> bool:
    return question.task == "count" and question.answer in "12345"


EXERCISES: Sequence[Exercise] = (
    Exercise("numbers of one to four digits", [one_number], _task("number")),
    Exercise("words of the lexicon", [one_word], _task("word")),
    Exercise("colors and shapes", [figures], _single_figure),
    Exercise("counting to five", [figures], _to_five),
    Exercise("looking up in tables and receipts", [table, receipt], _task("table")),
    Exercise("lines of text", [lines], _task("line", "lines")),
    Exercise("two pictures compared", [compare], _task("compare")),
    Exercise("small print, 1 tile", [page], _task("page"), scale=2, shortest=160),
    Exercise("small print, 5 tiles", [page], _task("page"), "high", scale=2, shortest=160),
    Exercise("colors and shapes, large, 1 tile", [figures], _single_figure, scale=2),
    Exercise("colors and shapes, large, 5 tiles", [figures], _single_figure, "high", scale=2),
)


def draw_items(exercise: Exercise, count: int, *, seed: int) -> list[Item]:
    """`count` items of an exercise, always the same, and the same pictures whatever the detail."""
    chance = random.Random(f"exam/{seed}/{exercise.scale}")
    typefaces = held_out_typefaces()
    items: list[Item] = []
    while len(items) < count:
        studio = Studio(
            chance,
            typefaces,
            width=exercise.scale * chance.randint(exercise.shortest, LONGEST),
            height=exercise.scale * chance.randint(exercise.shortest, LONGEST),
        )
        scene = chance.choice(exercise.painters)(studio)
        asked = [question for question in scene.questions if exercise.asks(scene, question)] if scene else []
        if scene and asked:
            question = chance.choice(asked)
            items.append(Item([_png(canvas.image) for canvas in scene.canvases], question.text, question.answer))
    return items


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


async def answers_to(llm: AsyncLLM, items: Sequence[Item], detail: ImageDetail) -> list[str]:
    """What the model says to each, greedily, many at once."""
    gate = asyncio.Semaphore(IN_FLIGHT)

    async def ask(number: int, item: Item) -> str:
        urls = ["data:image/png;base64," + base64.b64encode(picture).decode() for picture in item.pictures]
        pictures = [ImageInput(url=url, detail=detail, param="exam") for url in urls]
        chat = ChatInput(
            request_id=f"exam-{number}",
            turns=(Turn("user", (*pictures, TextPart(item.question))),),
            sampling=SamplingParams(temperature=0.0, max_tokens=MAX_ANSWER_TOKENS),
        )
        async with gate:
            request = await llm.prepare(chat)
            return "".join([output.text async for output in llm.generate(request)])

    return await asyncio.gather(*(ask(number, item) for number, item in enumerate(items)))


def wrong_answers(items: Sequence[Item], said: Sequence[str]) -> list[tuple[Item, str]]:
    """The items that were not answered to the letter, each with what was said; spaces around that do not count."""
    return [(item, answer) for item, answer in zip(items, said, strict=True) if answer.strip() != item.answer]


async def examine(
    llm: AsyncLLM, *, count: int, seed: int, only: str = "", show: Callable[[str], None] | None = None
) -> dict[str, float]:
    """The share of right answers of each exercise whose name contains `only`, over `count` items each.

    `show` gets a line for each wrong answer.
    """
    shares = {}
    for exercise in EXERCISES:
        if only not in exercise.name:
            continue
        items = draw_items(exercise, count, seed=seed)
        wrong = wrong_answers(items, await answers_to(llm, items, exercise.detail))
        shares[exercise.name] = 1 - len(wrong) / len(items)
        if show is not None:
            for item, answer in wrong:
                show(f"{exercise.name}: {item.question} {item.answer!r}, not {answer!r}")
    return shares


def examine_folder(
    folder: Path, *, count: int, seed: int, show: Callable[[str], None], quantization: str = "none"
) -> dict[str, float]:
    """`examine` for a checkpoint's folder, in float32, with steps large enough for many answers at once.

    Raises ConfigError for a quantization that the server does not have.
    """
    settings = {
        "model": str(folder),
        "dtype": "float32",
        "quantization": quantization,
        "num_threads": 1,  # two wait for each other more than they compute, and on a busy machine for everybody
        "max_model_len": 4096,
        "max_num_seqs": IN_FLIGHT,
        "max_num_batched_tokens": 2048,
        "max_num_batched_pixels": 8 * 980 * 980,
        "kv_cache_memory_gb": 0.5,
    }
    llm = build_llm(load_config(file=None, environ={}, flags=settings))

    async def run() -> dict[str, float]:
        await llm.start()
        try:
            return await examine(llm, count=count, seed=seed, show=show)
        finally:
            await llm.close()

    return asyncio.run(run())
