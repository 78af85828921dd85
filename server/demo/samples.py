"""The pictures to click on the playground, drawn by the painters of the exam: `python -m server.demo.samples`.

Seeds were chosen for pictures that look well and whose questions the bundled model answers right, each alone and one
after the other.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageChops

from server.demo.canvas import Canvas
from server.demo.scenes.catalog import PAINTERS
from server.demo.scenes.studio import Scene, Studio
from server.demo.typefaces import held_out_typefaces

FOLDER = Path(__file__).parent.parent / "web" / "samples"


@dataclass(frozen=True)
class Sample:
    """`kind` names a painter; `letters` are the smallest and largest in pixels an em; question `first` is put first.

    `title` is shown under the picture, `alt` told to whoever does not see it.
    """

    kind: str
    seed: int
    letters: tuple[int, int]
    title: str
    alt: str
    first: int = 0
    size: tuple[int, int] = (420, 280)

    @property
    def file(self) -> str:
        return f"{self.kind}.png"


SAMPLES: Sequence[Sample] = (
    Sample("receipt", 210, (22, 26), "A receipt", "A receipt: the shop, six goods with their prices, and the total"),
    Sample(
        *("figures", 78, (12, 64), "Colored shapes"),
        "Three hearts, two crosses and a circle, each of another color",
        first=2,
    ),
    Sample("table", 29, (20, 26), "A table", "A table of eight words, each with a price, in white on green", first=2),
    Sample(
        *("page", 5, (12, 15), "Small print: needs high detail"),
        "Small print: 36 words with a number each, in white italics on blue",
        first=2,
        size=(444, 296),
    ),
    Sample("number", 59, (120, 150), "A number", "A number of four digits in yellow on red"),
    Sample("word", 15, (90, 130), "A word", "A word in purple on white"),
)


def draw(sample: Sample) -> Scene:
    """The picture, in the middle of its paper, and what may be asked. Raises ConfigError without the extra `train`."""
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
    return replace(scene, canvases=[Canvas(_centered(canvas.image)) for canvas in scene.canvases])


def _centered(image: Image.Image) -> Image.Image:
    """What is drawn on paper of one color, moved to its middle: painters put it anywhere."""
    middle = Image.new("RGB", image.size, image.getpixel((0, 0)))
    box = ImageChops.difference(image, middle).getbbox()
    if box is None:
        raise ValueError("nothing is drawn on it")
    drawn = image.crop(box)
    middle.paste(drawn, ((image.width - drawn.width) // 2, (image.height - drawn.height) // 2))
    return middle


def write(folder: Path) -> None:
    """The pictures, and index.json with the questions about each and their answers."""
    listed = []
    for sample in SAMPLES:
        scene = draw(sample)
        scene.canvases[0].image.save(folder / sample.file, optimize=True)
        first = scene.questions.pop(sample.first)
        asked = {question.text: question.answer for question in (first, *scene.questions)}
        listed.append(
            {
                "file": sample.file,
                "title": sample.title,
                "alt": sample.alt,
                "questions": list(asked),
                "answers": list(asked.values()),
            }
        )
    (folder / "index.json").write_text(json.dumps(listed, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
