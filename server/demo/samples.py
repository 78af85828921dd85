"""The pictures to click on the playground, drawn by the painters of the exam: `python -m server.demo.samples`.

Seeds were chosen for pictures that look well and whose questions the bundled model answers right.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server.demo.scenes.catalog import PAINTERS
from server.demo.scenes.studio import Scene, Studio
from server.demo.typefaces import held_out_typefaces

FOLDER = Path(__file__).parent.parent / "web" / "samples"


@dataclass(frozen=True)
class Sample:
    """`kind` names a painter; `letters` are the smallest and largest in pixels an em; question `first` is put first."""

    kind: str
    seed: int
    size: tuple[int, int]
    letters: tuple[int, int]
    alt: str
    first: int = 0

    @property
    def file(self) -> str:
        return f"{self.kind}.png"


SAMPLES: Sequence[Sample] = (
    Sample(
        *("receipt", 8, (300, 380), (22, 28)),
        "A receipt of the shop Farmer: five goods with their prices, and the total",
        first=2,
    ),
    Sample(
        *("figures", 7, (420, 300), (12, 64)),
        "Six shapes: squares, circles and crosses in orange, blue, brown, pink and black",
        first=1,
    ),
    Sample("table", 13, (400, 260), (20, 26), "A table of seven words, each with a number, in pink on black"),
    Sample(
        *("page", 17, (448, 300), (12, 15)),
        "Small print: 36 words with a number each; read right with detail high, and not with low",
        first=2,
    ),
    Sample("number", 38, (420, 260), (110, 140), "A number of three digits in yellow on purple", first=2),
    Sample("word", 8, (440, 240), (90, 120), "A word in red italics"),
)


def draw(sample: Sample) -> Scene:
    """The picture and what may be asked about it. Raises ConfigError without the extra `train`."""
    studio = Studio(
        random.Random(f"samples/{sample.kind}/{sample.seed}"),
        held_out_typefaces(),
        width=sample.size[0],
        height=sample.size[1],
        min_letters=sample.letters[0],
        max_letters=sample.letters[1],
    )
    scene = PAINTERS[sample.kind](studio)
    if scene is None:
        raise ValueError(f"{sample.kind}: nothing fits with seed {sample.seed}")
    return scene


def write(folder: Path) -> None:
    """The pictures, and index.json with the questions about each and their answers."""
    listed = []
    for sample in SAMPLES:
        scene = draw(sample)
        scene.canvases[0].image.save(folder / sample.file, optimize=True)
        first = scene.questions.pop(sample.first)
        asked = {question.text: question.answer for question in (first, *scene.questions)}
        listed.append(
            {"file": sample.file, "alt": sample.alt, "questions": list(asked), "answers": list(asked.values())}
        )
    (folder / "index.json").write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
