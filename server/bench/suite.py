"""The rows that BENCHMARKS.md is made of: each is measured on our server and on its peers in turn, round by round.

Whatever else the machine does falls on all of them alike, so the ratio of a round means more than any of its times.
Every prompt and picture is new in each round; only the second turn of a conversation repeats anything.
"""

from __future__ import annotations

import json
import statistics
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from server.bench.admission import run_round
from server.bench.load import LoadPlan, run_load
from server.bench.report import summarise
from server.bench.stream import RequestRecord
from server.bench.target import Target, TargetError
from server.bench.workloads import Vocabulary, Workload, WorkloadSpec

Measure = Literal["tokens/s", "first token", "second turn", "stall"]
Runner = Callable[[Any], Any]  # runs a coroutine to its end

TURN_WORDS = 16  # of the answer and of the question that make a second turn
STREAM_WORDS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. Lengths are in tokens; `images` makes it one that only servers of pictures can do."""

    name: str
    measure: Measure
    concurrency: int = 1
    num_requests: int = 1
    input_len: int = 32
    output_len: int = 2
    images: int = 0
    image_size: tuple[int, int] = (640, 480)


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
SUITES = {"standard": STANDARD}


class UnknownRowError(ValueError):
    """A suite has no row of that name."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A server in the comparison. `without` names keys of our requests that it refuses."""

    name: str
    url: str
    model: str | None = None
    is_text_only: bool = False
    without: tuple[str, ...] = ()

    def can(self, row: Row) -> bool:
        """Whether a row asks it for something that it claims to do."""
        return not (self.is_text_only and row.images)


def parse_peer(text: str) -> Contender:
    """`NAME=URL[,model=ID][,text][,without=KEY]…`. Raises ValueError saying what is wrong."""
    head, *options = text.split(",")
    name, has_url, url = head.partition("=")
    if not (name and has_url and url.startswith(("http://", "https://"))):
        raise ValueError(f"a peer is NAME=URL[,model=ID][,text][,without=KEY], not {text!r}")
    peer = Contender(name, url)
    for option in options:
        key, _, value = option.partition("=")
        if option == "text":
            peer = replace(peer, is_text_only=True)
        elif key == "model" and value:
            peer = replace(peer, model=value)
        elif key == "without" and value:
            peer = replace(peer, without=(*peer.without, value))
        else:
            raise ValueError(f"a peer has model=, text and without=, not {option!r}")
    return peer


def choose_rows(suite: str, names: str | None) -> tuple[Row, ...]:
    """The suite's rows, or those of them that a list with commas names. Raises UnknownRowError."""
    rows = {row.name: row for row in SUITES[suite]}
    if names is None:
        return SUITES[suite]
    unknown = [name for name in names.split(",") if name not in rows]
    if unknown:
        raise UnknownRowError(f"--suite {suite} has no row {unknown[0]!r}: it has {', '.join(rows)}")
    return tuple(rows[name] for name in names.split(","))


@dataclass
class RowResult:
    """What each round gave, by contender: tokens a second, or milliseconds. `extra` has what else a row tells."""

    row: Row
    values: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[float]] = field(default_factory=dict)

    def ratios(self, ours: str, peer: str) -> list[float]:
        """How many times better ours is than a peer, round by round."""
        pairs = zip(self.values[ours], self.values[peer], strict=True)
        return [mine / its if self.row.measure == "tokens/s" else its / mine for mine, its in pairs]


class Suite:
    """Measures rows over contenders, the first of which is ours."""

    def __init__(
        self,
        contenders: Sequence[Contender],
        *,
        targets: Mapping[str, Target],
        vocabulary: Vocabulary,
        run: Runner,
        timeout: float,
        seed: int,
    ) -> None:
        self._contenders = contenders
        self._targets = targets
        self._vocabulary = vocabulary
        self._run = run
        self._timeout = timeout
        self._seed = seed

    def measure(self, row: Row, rounds: int, on_round: Callable[[], object] = lambda: None) -> RowResult:
        """One row. Every other round goes through them backwards. Raises TargetError for a failure."""
        result = RowResult(row)
        able = [contender for contender in self._contenders if contender.can(row)]
        if row.measure in ("second turn", "stall"):
            able = able[:1]  # these compare our server with itself
        for number in range(rounds):
            for contender in able if number % 2 == 0 else reversed(able):
                self._once(result, contender, number)
            on_round()
        return result

    def _once(self, result: RowResult, contender: Contender, number: int) -> None:
        row = result.row
        # Contenders get the same prompts in a round, and none gets one twice, not even in another row.
        spec = self._spec(contender, row, seed=zlib.crc32(f"{self._seed}/{row.name}/{number}".encode()))
        values = result.values.setdefault(contender.name, [])
        if row.measure == "second turn":
            first, second = self._turns(contender, spec, row)
            values.append(second)
            result.extra.setdefault("first turn, ms", []).append(first)
            result.extra.setdefault("second to first", []).append(second / first)
        elif row.measure == "stall":
            values.append(self._stall(result, contender, spec, row))
        else:
            bodies = [Workload(spec, self._vocabulary).body(index) for index in range(row.num_requests)]
            values.append(self._load(contender, bodies, row))

    def _spec(self, contender: Contender, row: Row, *, seed: int) -> WorkloadSpec:
        return WorkloadSpec(
            model=contender.model or "",
            input_len=row.input_len,
            output_len=row.output_len,
            images=row.images,
            image_size=row.image_size,
            image_detail="high",
            seed=seed,
            extra_body=dict.fromkeys(contender.without),
        )

    def _load(self, contender: Contender, bodies: Sequence[bytes], row: Row) -> float:
        target = self._targets[contender.name]
        loaded = self._run(
            run_load(
                LoadPlan(concurrency=row.concurrency, timeout=self._timeout),
                url=target.chat_url,
                headers=target.headers,
                bodies=bodies,
                warmup=[],
            )
        )
        for record in loaded.records:
            if record.error is not None:
                raise TargetError(f"{contender.name}, {row.name}: {record.error}")
        if row.measure == "tokens/s":
            return summarise(loaded).output_tokens_per_s
        return 1e3 * statistics.median(first_text(contender, record) for record in loaded.records)

    def _turns(self, contender: Contender, spec: WorkloadSpec, row: Row) -> tuple[float, float]:
        """Milliseconds to the first token of a first turn with a picture, and of one more about the same picture."""
        workload = Workload(spec, self._vocabulary)
        words = Workload(replace(spec, images=0, input_len=TURN_WORDS, seed=spec.seed + 1), self._vocabulary)
        firsts = [workload.body(index) for index in range(row.num_requests)]
        seconds = []
        for index, first in enumerate(firsts):
            body = json.loads(first)
            answer, question = (json.loads(words.body(2 * index + turn))["messages"][0] for turn in (0, 1))
            body["messages"] += [{**answer, "role": "assistant"}, question]
            seconds.append(json.dumps(body).encode())
        return self._load(contender, firsts, row), self._load(contender, seconds, row)

    def _stall(self, result: RowResult, contender: Contender, spec: WorkloadSpec, row: Row) -> float:
        """Milliseconds of the largest gap in running streams while requests with pictures arrive."""
        streams = Workload(replace(spec, images=0, input_len=STREAM_WORDS), self._vocabulary)
        pictures = Workload(replace(spec, output_len=1), self._vocabulary)
        whole = Workload(replace(spec, output_len=1, image_detail="low"), self._vocabulary)
        target = self._targets[contender.name]
        found = self._run(
            run_round(
                url=target.chat_url,
                headers=target.headers,
                streams=[streams.body(index) for index in range(row.concurrency)],
                pictures=[pictures.body(index) for index in range(row.num_requests)],
                whole=whole.body(0, warmup=True),
                timeout=self._timeout,
            )
        )
        result.extra.setdefault("usual gap, ms", []).append(1e3 * found.usual_gap)
        result.extra.setdefault("a tile, ms", []).append(1e3 * (found.tile or 0.0))
        result.extra.setdefault("gap less a tile, in usual gaps", []).append(found.excess)
        return float(1e3 * found.largest_gap)


def first_text(contender: Contender, record: RequestRecord) -> float:
    """Seconds to the first text: some servers open a stream long before they have a token.

    Raises TargetError for an answer that showed none.
    """
    seconds = record.time_to_first_text
    if seconds is None:
        raise TargetError(f"{contender.name}: an answer had no text")
    return seconds


def render(results: Sequence[RowResult], contenders: Sequence[Contender]) -> str:
    """A table in Markdown: medians, and how many times better ours is (median, least and most over the rounds)."""
    ours, *peers = (contender.name for contender in contenders)
    lines = [
        f"| row | what | {ours} | " + "".join(f"{peer} | ours to {peer} | " for peer in peers) + "besides |",
        "| --- | --- | --- | " + "--- | --- | " * len(peers) + "--- |",
    ]
    for result in results:
        cells = [result.row.name, _what(result.row), _median(result.values[ours])]
        for peer in peers:
            if peer in result.values:
                ratios = result.ratios(ours, peer)
                spread = f"**{statistics.median(ratios):.2f}×** ({min(ratios):.2f} to {max(ratios):.2f})"
                cells += [_median(result.values[peer]), spread]
            else:
                cells += ["", ""]
        cells.append("; ".join(f"{name} {_median(values)}" for name, values in result.extra.items()))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _what(row: Row) -> str:
    unit = "output tokens/s" if row.measure == "tokens/s" else "ms to the first token"
    if row.measure == "stall":
        unit = "ms, largest gap"
    picture = f" + {row.image_size[0]}×{row.image_size[1]} split" if row.images else ""
    return f"{unit}; {row.input_len} in{picture}, {row.output_len} out, {row.concurrency} at once"


def _median(values: Sequence[float]) -> str:
    value = statistics.median(values)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def to_json(results: Sequence[RowResult]) -> list[dict[str, Any]]:
    """Every round of every row."""
    return [
        {"row": result.row.name, "measure": result.row.measure, "rounds": result.values, **result.extra}
        for result in results
    ]
