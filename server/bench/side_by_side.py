"""Measures rows of a suite on our server and on its peers in turn, round by round, and tells how they compare.

Whatever else the machine does falls on all of them alike, so the ratio of a round means more than any of its times.
Every prompt and picture is new in each round; only the second turn of a conversation repeats anything.
"""

from __future__ import annotations

import json
import re
import statistics
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from server.bench.admission import AdmissionError, run_round
from server.bench.load import LoadPlan, run_fast, run_load
from server.bench.report import doubts, summarise
from server.bench.stream import RequestRecord
from server.bench.suite import Row
from server.bench.target import Target, TargetError
from server.bench.workloads import Vocabulary, Workload, WorkloadSpec

TURN_WORDS = 16  # of the answer and of the question that make a second turn
STREAM_WORDS = 64

_REFUSAL = re.compile(r"HTTP (400|404|413|422)\b")


class RefusedError(TargetError):
    """The server said that it cannot do what was asked: a prompt beyond its context, pictures, an unknown key."""


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


def in_turn(contenders: Sequence[Contender], number: int) -> list[Contender]:
    """The order of round `number`: every other one goes backwards, so that none is always the first."""
    return list(contenders if number % 2 == 0 else reversed(contenders))


@dataclass
class RowResult:
    """What each round gave, by contender: tokens a second, or milliseconds.

    `extra` has what else a row tells of our server and `memory` the MiB that each contender's process held after each
    round, where it says. `dropped` has why a contender is not compared, `doubts` what to know of its last round.
    """

    row: Row
    values: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, list[float]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    doubts: dict[str, list[str]] = field(default_factory=dict)

    def ratios(self, ours: str, peer: str) -> list[float]:
        """How many times better ours is than a peer, round by round; none where one of them is not compared."""
        if ours not in self.values or peer not in self.values:
            return []
        pairs = zip(self.values[ours], self.values[peer], strict=True)
        return [mine / its if self.row.measure == "tokens/s" else its / mine for mine, its in pairs]

    def drop(self, name: str, reason: str) -> None:
        """Leave a contender out of this row: half of its rounds would compare with other rounds of ours."""
        self.dropped[name] = reason
        for kept in (self.values, self.memory, self.doubts):
            kept.pop(name, None)


class Suite:
    """Measures rows over contenders, the first of which is ours."""

    def __init__(
        self,
        contenders: Sequence[Contender],
        *,
        targets: Mapping[str, Target],
        vocabulary: Vocabulary,
        timeout: float,
        seed: int,
    ) -> None:
        """`targets` are by the contenders' names; `timeout` is the longest silence of a request in seconds."""
        self._contenders = contenders
        self._targets = targets
        self._vocabulary = vocabulary
        self._timeout = timeout
        self._seed = seed

    def measure(self, row: Row, rounds: int, on_round: Callable[[], object] = lambda: None) -> RowResult:
        """One row. A peer that fails is dropped from it, and so are we where a curve leads beyond what we can do.

        Raises TargetError for any other failure of ours: there is nothing to compare with then.
        """
        result = RowResult(row)
        able = [contender for contender in self._contenders if contender.can(row)]
        if row.measure in ("second turn", "stall"):
            able = able[:1]  # these compare our server with itself
        for number in range(rounds):
            for contender in in_turn(able, number):
                if contender.name not in result.dropped:
                    self._try(result, contender, number)
            on_round()
        return result

    def _try(self, result: RowResult, contender: Contender, number: int) -> None:
        try:
            self._once(result, contender, number)
        except TargetError as error:
            may_fail = result.row.curve is not None and isinstance(error, RefusedError)
            if contender is self._contenders[0] and not may_fail:
                raise TargetError(f"{contender.name}, {result.row.name}: {error}") from None
            result.drop(contender.name, str(error))
        else:
            held = self._targets[contender.name].resident_memory()
            if held is not None:
                result.memory.setdefault(contender.name, []).append(held / 2**20)

    def _once(self, result: RowResult, contender: Contender, number: int) -> None:
        row = result.row
        # Contenders get the same prompts in a round, and none gets one twice, not even in another row.
        spec = self._spec(contender, row, seed=zlib.crc32(f"{self._seed}/{row.name}/{number}".encode()))
        if row.measure == "second turn":
            value = self._turns(result, contender, spec)
        elif row.measure == "stall":
            value = self._stall(result, contender, spec)
        else:
            bodies = [Workload(spec, self._vocabulary).body(index) for index in range(row.num_requests)]
            value = self._load(result, contender, bodies)
        result.values.setdefault(contender.name, []).append(value)

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

    def _load(
        self, result: RowResult, contender: Contender, bodies: Sequence[bytes], *, may_be_cached: bool = False
    ) -> float:
        """Tokens a second of the load, or milliseconds to the first text (median). Raises TargetError."""
        row, target = result.row, self._targets[contender.name]
        loaded = run_fast(
            run_load(
                LoadPlan(concurrency=row.concurrency, timeout=self._timeout),
                url=target.chat_url,
                headers=target.headers,
                bodies=bodies,
            )
        )
        for record in loaded.records:
            if record.error is not None:
                raise failure(record.error)
        summary = summarise(loaded)
        found = doubts(summary, {"output_len": row.output_len, "repeat_images": may_be_cached})
        silent = sum(not record.text_times for record in loaded.records)
        if silent and row.measure != "tokens/s":
            found.append(f"{silent} answers showed no text: the time of their end was taken")
        if found:
            result.doubts[contender.name] = found
        if row.measure == "tokens/s":
            return summary.output_tokens_per_s
        return 1e3 * statistics.median(first_text(record) for record in loaded.records)

    def _turns(self, result: RowResult, contender: Contender, spec: WorkloadSpec) -> float:
        """Milliseconds to the first text of one more turn about a picture; those of the first go into `extra`."""
        workload = Workload(spec, self._vocabulary)
        words = Workload(replace(spec, images=0, input_len=TURN_WORDS, seed=spec.seed + 1), self._vocabulary)
        firsts = [workload.body(index) for index in range(result.row.num_requests)]
        seconds = []
        for index, first in enumerate(firsts):
            body = json.loads(first)
            answer, question = (json.loads(words.body(2 * index + turn))["messages"][0] for turn in (0, 1))
            body["messages"] += [{**answer, "role": "assistant"}, question]
            seconds.append(json.dumps(body).encode())
        before = self._load(result, contender, firsts)
        after = self._load(result, contender, seconds, may_be_cached=True)
        result.extra.setdefault("first turn, ms", []).append(before)
        result.extra.setdefault("second to first", []).append(after / before)
        return after

    def _stall(self, result: RowResult, contender: Contender, spec: WorkloadSpec) -> float:
        """Milliseconds of the largest gap in running streams while requests with pictures arrive."""
        streams = Workload(replace(spec, images=0, input_len=STREAM_WORDS), self._vocabulary)
        pictures = Workload(replace(spec, output_len=1), self._vocabulary)
        whole = Workload(replace(spec, output_len=1, image_detail="low"), self._vocabulary)
        target = self._targets[contender.name]
        try:
            found = run_fast(
                run_round(
                    url=target.chat_url,
                    headers=target.headers,
                    streams=[streams.body(index) for index in range(result.row.concurrency)],
                    pictures=[pictures.body(index) for index in range(result.row.num_requests)],
                    whole=whole.body(0, warmup=True),
                    timeout=self._timeout,
                )
            )
        except AdmissionError as error:
            raise failure(str(error)) from None
        besides = {
            "usual gap, ms": 1e3 * found.usual_gap,
            "largest before, ms": 1e3 * found.quiet_gap,
            "to largest before": found.largest_gap / found.quiet_gap,
        }
        if found.tile is not None:
            besides["a tile, ms"] = 1e3 * found.tile
            besides["in tiles"] = found.largest_gap / found.tile
            besides["gap less a tile, in usual gaps"] = found.excess
        for name, value in besides.items():
            result.extra.setdefault(name, []).append(value)
        return 1e3 * found.largest_gap


def failure(reason: str) -> TargetError:
    """RefusedError where the reason is one that the server gives for what it cannot do, else TargetError."""
    return RefusedError(reason) if _REFUSAL.match(reason) else TargetError(reason)


def first_text(record: RequestRecord) -> float:
    """Seconds to the first text of a whole answer: some servers open a stream long before they have a token.

    A token may show none (the end of a text, half a letter). The end of an answer of nothing else is a token late,
    which is in nobody's favour. Raises TargetError for an answer without any event.
    """
    seconds = record.latency if record.time_to_first_text is None else record.time_to_first_text
    if seconds is None:
        raise TargetError("an answer had no event")
    return seconds


def render(results: Sequence[RowResult], contenders: Sequence[Contender]) -> str:
    """A table in Markdown: medians, and how many times better ours is (median, least and most over the rounds).

    Below it what was not compared, and what makes numbers doubtful.
    """
    ours, *peers = (contender.name for contender in contenders)
    lines = [
        f"| row | what | {ours} | " + "".join(f"{peer} | ours to {peer} | " for peer in peers) + "besides |",
        "| --- | --- | --- | " + "--- | --- | " * len(peers) + "--- |",
    ]
    for result in results:
        cells = [result.row.name, _what(result.row), _median(result.values.get(ours))]
        for peer in peers:
            cells += [_median(result.values.get(peer)), _spread(result.ratios(ours, peer))]
        cells.append("; ".join(f"{name} {_median(values)}" for name, values in result.extra.items()))
        lines.append("| " + " | ".join(cells) + " |")
    notes = [
        f"! {name}, {result.row.name}: {note}"
        for result in results
        for name, found in [*((name, [why]) for name, why in result.dropped.items()), *result.doubts.items()]
        for note in found
    ]
    return "\n".join([*lines, "", *notes] if notes else lines)


def _what(row: Row) -> str:
    unit = "output tokens/s" if row.measure == "tokens/s" else "ms to the first token"
    if row.measure == "stall":
        unit = "ms, largest gap"
    count = f"{row.images} × " if row.images > 1 else ""
    picture = f" + {count}{row.image_size[0]}×{row.image_size[1]} split" if row.images else ""
    return f"{unit}; {row.input_len} in{picture}, {row.output_len} out, {row.concurrency} at once"


def _median(values: Sequence[float] | None) -> str:
    if not values:
        return ""
    value = statistics.median(values)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _spread(ratios: Sequence[float]) -> str:
    return f"**{statistics.median(ratios):.2f}×** ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""


def to_json(results: Sequence[RowResult], contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    """Every round of every row, with the medians and the ratios that the table has."""
    ours, *peers = (contender.name for contender in contenders)
    rows = []
    for result in results:
        ratios = {peer: found for peer in peers if (found := result.ratios(ours, peer))}
        rows.append(
            {
                "row": result.row.name,
                "settings": asdict(result.row),
                "rounds": result.values,
                "medians": {name: statistics.median(values) for name, values in result.values.items()},
                "ratios": ratios,
                "ratio_medians": {peer: statistics.median(found) for peer, found in ratios.items()},
                "besides": result.extra,
                "memory_mib": result.memory,
                "dropped": result.dropped,
                "doubts": result.doubts,
            }
        )
    return rows
