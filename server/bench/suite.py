"""The rows of the suites as data: what BENCHMARKS.md is made of, and the points of the curves that show how it scales.

Knows nothing of servers: `side_by_side` measures rows and `plots` draws curves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Measure = Literal["tokens/s", "first token", "second turn", "stall"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. Lengths are in tokens; `images` makes it one that only servers of pictures can do.

    A row with a `curve` is the point of it at `x`, and may be more than a server can do: there the curve ends.
    """

    name: str
    measure: Measure
    concurrency: int = 1
    num_requests: int = 1
    input_len: int = 32
    output_len: int = 2
    images: int = 0
    image_size: tuple[int, int] = (640, 480)
    curve: str | None = None
    x: int = 0


class UnknownRowError(ValueError):
    """A suite has no row of that name."""


STANDARD = (
    Row(name="text-1", measure="tokens/s", num_requests=2, input_len=256, output_len=128),
    Row(name="text-8", measure="tokens/s", concurrency=8, num_requests=8, input_len=256, output_len=128),
    Row(name="text-32", measure="tokens/s", concurrency=32, num_requests=32, input_len=256, output_len=128),
    Row(name="prompt-1024", measure="first token", num_requests=3, input_len=1024),
    Row(name="picture", measure="first token", num_requests=3, images=1),
    Row(name="picture-8", measure="tokens/s", concurrency=8, num_requests=8, output_len=64, images=1),
    Row(name="second-turn", measure="second turn", num_requests=3, images=1),
    Row(name="stall", measure="stall", concurrency=8, num_requests=4, images=1, image_size=(980, 980), output_len=400),
)

# What is along the x axis of each curve.
CURVES = {"concurrency": "requests in flight", "prompt": "tokens of the prompt", "images": "640×480 pictures, split"}


def _at_once(count: int) -> Row:
    # Two at least: one alone would be judged by a single answer.
    return Row(
        name=f"concurrency-{count}",
        measure="tokens/s",
        concurrency=count,
        num_requests=max(2, count),
        input_len=256,
        output_len=128,
        curve="concurrency",
        x=count,
    )


def _prompt_of(length: int) -> Row:
    return Row(name=f"prompt-{length}", measure="first token", input_len=length, curve="prompt", x=length)


def _images(count: int) -> Row:
    return Row(name=f"images-{count}", measure="first token", images=count, curve="images", x=count)


SCALING = (
    *(_at_once(count) for count in (1, 2, 4, 8, 16, 32, 64)),
    # The last is what a context of 8,192 holds beside the chat template and the answer.
    *(_prompt_of(length) for length in (128, 256, 512, 1024, 2048, 4096, 8000)),
    *(_images(count) for count in (0, 1, 2, 4, 8, 16)),
)
SUITES = {"standard": STANDARD, "scaling": SCALING}


def choose_rows(suite: str, names: str | None) -> tuple[Row, ...]:
    """The suite's rows, or those that a list with commas names, by their own names or by those of whole curves.

    Each comes once, in the order asked for. Raises UnknownRowError.
    """
    rows = SUITES[suite]
    if names is None:
        return rows
    chosen: dict[str, Row] = {}
    for name in names.split(","):
        found = {row.name: row for row in rows if name in (row.name, row.curve)}
        if not found:
            raise UnknownRowError(f"--suite {suite} has no row {name!r}: it has {', '.join(row.name for row in rows)}")
        chosen |= found
    return tuple(chosen.values())
