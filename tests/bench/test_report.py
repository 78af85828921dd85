from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.bench.load import LoadResult
from server.bench.report import distribution, percentile, render, save, summarise, to_json
from server.bench.stream import RequestRecord

CONFIG = {"model": "m", "request_rate": None, "output_len": 4, "shared_prefix_len": 0, "repeat_images": False}


def record(index: int, **changes: Any) -> RequestRecord:
    """Sent at 100 + index s; first token 0.5 s later, then one each 0.1 s, 4 in all."""
    start = 100.0 + index
    times = [start + 0.5 + 0.1 * number for number in range(4)]
    fields: dict[str, Any] = {
        "index": index,
        "due": start,
        "start": start,
        "first_token": times[0],
        "last_token": times[-1],
        "text_times": times,
        "end": start + 1.0,
        "prompt_tokens": 10,
        "completion_tokens": 4,
        "cached_tokens": 0,
        "usage_reported": True,
        "finish_reason": "length",
    }
    return RequestRecord(**{**fields, **changes})


def result(*records: RequestRecord, **changes: Any) -> LoadResult:
    fields: dict[str, Any] = {"warmup": [], "duration": 4.0, "peak_in_flight": 1, "client_cpu": 0.2}
    return LoadResult(records=list(records), **{**fields, **changes})


@pytest.mark.parametrize("size", [1, 2, 3, 100, 101])
def test_percentiles_are_numpys(size: int) -> None:
    generator = random.Random(size)
    values = sorted(generator.random() for _ in range(size))
    for percent in (0, 1, 50, 99, 100):
        assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)))


def test_a_distribution_is_in_milliseconds_and_leaves_out_what_is_missing() -> None:
    found = distribution([0.004, None, 0.001, 0.001])
    assert found is not None
    assert (found.mean, found.median, found.p99, found.max) == pytest.approx((2.0, 1.0, 3.94, 4.0))
    assert distribution([None]) is None


def test_numbers_of_a_run() -> None:
    summary = summarise(result(record(0), record(1), record(2, error="HTTP 500: boom")))
    assert (summary.completed, summary.failed) == (2, 1)
    assert summary.errors == {"HTTP 500: boom": 1}
    assert summary.requests_per_s == 0.5
    assert summary.output_tokens_per_s == 2.0
    assert summary.total_tokens_per_s == 7.0
    assert summary.mean_in_flight == 0.75  # three requests of a second in four seconds
    assert summary.client_cpu == 0.05
    assert summary.tokens_per_event == 1.0
    for measure, median in [
        (summary.ttft_ms, 500),
        (summary.text_ms, 500),
        (summary.tpot_ms, 100),
        (summary.itl_ms, 100),
        (summary.longest_gap_ms, 100),
        (summary.e2e_ms, 800),
        (summary.late_ms, 0),
    ]:
        assert measure is not None
        assert measure.median == pytest.approx(median)


def test_the_longest_gap_is_seen_where_the_median_hides_it() -> None:
    stalled = record(1, text_times=[101.5, 101.6, 103.0, 103.1])
    summary = summarise(result(record(0), stalled))
    assert summary.itl_ms is not None
    assert summary.itl_ms.median == pytest.approx(100)
    assert summary.itl_ms.max == pytest.approx(1400)
    assert summary.longest_gap_ms is not None
    assert summary.longest_gap_ms.median == pytest.approx(750)


def test_the_times_of_failed_requests_are_left_out() -> None:
    failed = record(1, error="stream ended without [DONE]", first_token=150.0, completion_tokens=4)
    summary = summarise(result(record(0), failed))
    assert summary.ttft_ms is not None
    assert summary.ttft_ms.max == pytest.approx(500)
    assert summary.completion_tokens == 4


def test_a_run_of_failures_alone_can_be_told() -> None:
    failed = RequestRecord(index=0, due=1.0, start=1.0, end=1.0, error="HTTP 429: full")
    summary = summarise(result(failed, failed, duration=0.0))
    assert (summary.ttft_ms, summary.itl_ms, summary.cached_tokens) == (None, None, None)
    assert summary.requests_per_s == 0.0
    assert "failed: 2 × HTTP 429: full" in render(summary, CONFIG)


def test_the_table_is_aligned_and_names_every_measure() -> None:
    text = render(summarise(result(record(0), record(1))), CONFIG)
    table = text.split("\n\n")[1].splitlines()
    assert {len(line) for line in table} == {24 + 4 * 12}
    assert table[0].split() == ["milliseconds", "mean", "median", "p99", "max"]
    assert table[1].split()[-4:] == ["500.00"] * 4
    assert "2 done, 0 failed" in text
    assert "!" not in text
    assert "sent later than due" not in text


def test_an_open_loop_shows_how_late_it_was() -> None:
    text = render(summarise(result(record(0, due=99.75))), {**CONFIG, "request_rate": 2.0})
    (line,) = [line for line in text.splitlines() if line.startswith("sent later than due")]
    assert line.split()[-4:] == ["250.00"] * 4


@pytest.mark.parametrize(
    ("changed", "run", "config", "warning"),
    [
        ({"cached_tokens": 8}, {}, {}, "prefix cache"),
        ({"completion_tokens": 3}, {}, {}, "output is 6 tokens where 8 were asked for"),
        ({"usage_reported": False}, {}, {}, "2 answers without usage"),
        ({}, {"client_cpu": 3.9}, {}, "load generator is near its limit"),
        ({}, {"warmup": [record(0, error="HTTP 500")]}, {}, "failed in the warm-up: 1"),
    ],
)
def test_what_makes_numbers_doubtful_is_said(
    changed: dict[str, Any], run: dict[str, Any], config: dict[str, Any], warning: str
) -> None:
    text = render(summarise(result(record(0, **changed), record(1, **changed), **run)), {**CONFIG, **config})
    assert warning in text


@pytest.mark.parametrize("wanted", [{"shared_prefix_len": 5}, {"repeat_images": True}])
def test_a_cache_that_was_asked_for_is_no_cause_for_doubt(wanted: dict[str, Any]) -> None:
    assert "!" not in render(summarise(result(record(0, cached_tokens=8))), {**CONFIG, **wanted})


def test_the_saved_report_holds_settings_machine_numbers_and_requests(tmp_path: Path) -> None:
    run = result(record(0), record(1, error="HTTP 500", first_token=None, last_token=None, text_times=[]))
    path = tmp_path / "report.json"
    save(to_json(run, summarise(run), config=CONFIG, save_requests=True), path)
    report = json.loads(path.read_text())
    assert report["config"] == CONFIG
    assert set(report["machine"]) == {"cpu", "cores", "python", "system"}
    assert report["machine"]["cores"] >= 1
    assert report["summary"]["ttft_ms"] == {"mean": 500.0, "median": 500.0, "p99": 500.0, "max": 500.0}
    assert report["summary"]["errors"] == {"HTTP 500": 1}
    first, second = report["requests"]
    assert (first["start"], first["first_token"], first["end"]) == (0.0, 0.5, 1.0)
    assert first["text_times"] == pytest.approx([0.5, 0.6, 0.7, 0.8])
    assert (second["start"], second["first_token"], second["error"]) == (1.0, None, "HTTP 500")


def test_requests_are_saved_only_when_asked_for() -> None:
    run = result(record(0))
    assert "requests" not in to_json(run, summarise(run), config=CONFIG)
