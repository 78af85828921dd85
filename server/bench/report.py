"""Turns the records of a run into numbers: a table to read and a JSON file to keep.

Latencies are over the requests that succeeded; those that failed are counted, shown by reason, and never left out of
the duration that throughput is divided by.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from server.bench.load import LoadResult
from server.bench.stream import RequestRecord

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Distribution:
    """Of one measure, in milliseconds."""

    mean: float
    median: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The numbers of a run. Throughputs are per second of `duration_s` and count successful requests only.

    `ttft_ms` is time to first token, `text_ms` to first text, `tpot_ms` time per output token, `itl_ms` the gaps
    between events with text, `longest_gap_ms` the longest of them in each request, `e2e_ms` from start to last token,
    `late_ms` how much later than due a request was sent; None where there is nothing to measure. `cached_tokens` is
    None where the server does not say. `client_cpu` is the load generator's own CPU use, 1 being a whole core.
    """

    completed: int
    failed: int
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None
    tokens_per_event: float | None
    mean_in_flight: float
    peak_in_flight: int
    client_cpu: float
    ttft_ms: Distribution | None
    text_ms: Distribution | None
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    longest_gap_ms: Distribution | None
    e2e_ms: Distribution | None
    late_ms: Distribution | None
    errors: Mapping[str, int]
    without_usage: int
    warmup_failed: int


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in ascending order, interpolated linearly between the two nearest, as numpy does."""
    place = (len(ordered) - 1) * percent / 100
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def distribution(seconds: Iterable[float | None]) -> Distribution | None:
    """Of values in seconds, leaving out what was not measured; None of none."""
    ordered = sorted(1000 * value for value in seconds if value is not None)
    if not ordered:
        return None
    return Distribution(
        mean=math.fsum(ordered) / len(ordered),
        median=percentile(ordered, 50),
        p99=percentile(ordered, 99),
        max=ordered[-1],
    )


def summarise(result: LoadResult) -> Summary:
    good = [record for record in result.records if record.error is None]
    seconds = result.duration or math.inf
    prompt = sum(record.prompt_tokens for record in good)
    completion = sum(record.completion_tokens for record in good)
    cached = [record.cached_tokens for record in good if record.cached_tokens is not None]
    events = sum(len(record.text_times) for record in good)
    return Summary(
        completed=len(good),
        failed=len(result.records) - len(good),
        duration_s=result.duration,
        requests_per_s=len(good) / seconds,
        output_tokens_per_s=completion / seconds,
        total_tokens_per_s=(prompt + completion) / seconds,
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_tokens=sum(cached) if cached else None,
        tokens_per_event=completion / events if events else None,
        mean_in_flight=sum(record.end - record.start for record in result.records) / seconds,
        peak_in_flight=result.peak_in_flight,
        client_cpu=result.client_cpu / seconds,
        ttft_ms=distribution(record.time_to_first_token for record in good),
        text_ms=distribution(record.time_to_first_text for record in good),
        tpot_ms=distribution(record.time_per_token for record in good),
        itl_ms=distribution(gap for record in good for gap in record.gaps()),
        longest_gap_ms=distribution(max(record.gaps(), default=None) for record in good),
        e2e_ms=distribution(record.latency for record in good),
        late_ms=distribution(record.start - record.due for record in result.records),
        errors=dict(Counter(record.error for record in result.records if record.error is not None).most_common()),
        without_usage=sum(not record.usage_reported for record in good),
        warmup_failed=sum(record.error is not None for record in result.warmup),
    )


def render(summary: Summary, config: Mapping[str, Any]) -> str:
    """The report as aligned text, with what makes the numbers doubtful at its end."""
    return "\n".join([*_counts(summary), "", *_table(summary, config), *_warnings(summary, config)])


def _counts(summary: Summary) -> list[str]:
    cached = "not reported" if summary.cached_tokens is None else f"{summary.cached_tokens:,}"
    per_event = "" if summary.tokens_per_event is None else f", {summary.tokens_per_event:.2f} an event"
    rows = [
        ("requests", f"{summary.completed:,} done, {summary.failed:,} failed, in {summary.duration_s:.2f} s"),
        ("prompt tokens", f"{summary.prompt_tokens:,} (from cache: {cached})"),
        ("output tokens", f"{summary.completion_tokens:,}{per_event}"),
        ("in flight", f"mean {summary.mean_in_flight:.1f}, peak {summary.peak_in_flight}"),
        ("load generator", f"{summary.client_cpu:.1%} of a core"),
        ("requests/s", f"{summary.requests_per_s:.2f}"),
        ("output tokens/s", f"{summary.output_tokens_per_s:.1f}"),
        ("total tokens/s", f"{summary.total_tokens_per_s:.1f}"),
    ]
    return [f"{name:<24}{value}" for name, value in rows]


def _table(summary: Summary, config: Mapping[str, Any]) -> list[str]:
    rows = [
        ("time to first token", summary.ttft_ms),
        ("time to first text", summary.text_ms),
        ("time per output token", summary.tpot_ms),
        ("gap between events", summary.itl_ms),
        ("longest gap of each", summary.longest_gap_ms),
        ("end to end", summary.e2e_ms),
    ]
    if config.get("request_rate") is not None:
        rows.append(("sent later than due", summary.late_ms))
    lines = [f"{'milliseconds':<24}" + "".join(f"{name:>12}" for name in ("mean", "median", "p99", "max"))]
    for name, values in rows:
        cells = ["-"] * 4 if values is None else [f"{value:.2f}" for value in asdict(values).values()]
        lines.append(f"{name:<24}" + "".join(f"{cell:>12}" for cell in cells))
    return lines


def _warnings(summary: Summary, config: Mapping[str, Any]) -> list[str]:
    lines = doubts(summary, config)
    return ["", *(f"! {line}" for line in lines)] if lines else []


def doubts(summary: Summary, config: Mapping[str, Any]) -> list[str]:
    """What to know before the numbers are believed, a line each. Of `config` it reads `output_len` and what requests
    share: `shared_prefix_len` and `repeat_images`.
    """
    lines = [f"failed: {count} × {reason}" for reason, count in summary.errors.items()]
    if summary.warmup_failed:
        lines.append(f"failed in the warm-up: {summary.warmup_failed}")
    if summary.without_usage:
        lines.append(f"{summary.without_usage} answers without usage: their events with text were counted as tokens")
    wanted = summary.completed * int(config.get("output_len") or 0)
    if wanted and summary.completion_tokens != wanted:
        lines.append(f"output is {summary.completion_tokens} tokens where {wanted} were asked for")
    shared = config.get("shared_prefix_len") or config.get("repeat_images")
    if not shared and (summary.cached_tokens or 0) > 0.1 * summary.prompt_tokens:
        lines.append("much of the prompts came from the server's prefix cache: was this seed used before?")
    if summary.client_cpu > 0.8:
        lines.append("the load generator is near its limit: its own delays are in these times")
    return lines


def machine_facts() -> dict[str, Any]:
    """Of the machine that runs the load generator, which need not be the server's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def to_json(
    result: LoadResult, summary: Summary, *, config: Mapping[str, Any], save_requests: bool = False
) -> dict[str, Any]:
    """What is saved: configuration, machine, numbers, and each request when asked for."""
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": dict(config),
        "machine": machine_facts(),
        "summary": asdict(summary),
    }
    if save_requests:
        origin = min((record.start for record in result.records), default=0.0)
        report["requests"] = [_request_json(record, origin) for record in result.records]
    return report


def _request_json(record: RequestRecord, origin: float) -> dict[str, Any]:
    """One record; times are seconds after the first request was sent."""
    fields = asdict(record)
    for name in ("due", "start", "first_token", "last_token", "end"):
        fields[name] = None if fields[name] is None else round(fields[name] - origin, 6)
    fields["text_times"] = [round(moment - origin, 6) for moment in record.text_times]
    return fields


def save(report: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
