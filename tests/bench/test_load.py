from __future__ import annotations

import asyncio
import itertools
import json
import statistics
from collections.abc import Sequence

import pytest
from starlette.responses import JSONResponse

from server.bench.load import LoadPlan, LoadResult, WarmupError, arrival_offsets, run_load
from server.bench.stream import RequestRecord
from tests.bench.canned import DONE, Answer, CannedServer, event, role, text, usage, whole_answer


def bodies(count: int) -> list[bytes]:
    return [json.dumps({"number": number}).encode() for number in range(count)]


def load(
    server: CannedServer, plan: LoadPlan, *, count: int, warmup: int = 0, seen: list[RequestRecord] | None = None
) -> LoadResult:
    done = seen if seen is not None else []
    warm: Sequence[bytes] = [b'{"warm": true}'] * warmup
    return asyncio.run(
        run_load(
            plan,
            url=server.chat_url,
            headers={"Authorization": "Bearer key"},
            bodies=bodies(count),
            warmup=warm,
            on_done=done.append,
        )
    )


def test_closed_loop_sends_all_and_never_more_than_n_at_once() -> None:
    seen: list[RequestRecord] = []
    with CannedServer().running() as server:
        result = load(server, LoadPlan(concurrency=3), count=10, seen=seen)
    assert server.peak == result.peak_in_flight == 3
    assert sorted(body["number"] for body in server.bodies) == list(range(10))
    assert [record.index for record in result.records] == list(range(10))
    assert sorted(record.index for record in seen) == list(range(10))
    assert [record.error for record in result.records] == [None] * 10
    assert len(server.clients) == 3  # connections are kept
    assert server.headers[0]["authorization"] == "Bearer key"
    assert server.headers[0]["content-type"] == "application/json"


def test_a_record_has_the_times_and_counts_of_its_stream() -> None:
    with CannedServer().running() as server:
        result = load(server, LoadPlan(concurrency=1), count=2)
    for record in result.records:
        assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (50, 3, 2)
        assert record.finish_reason == "length"
        assert len(record.text_times) == 3
        # What the server slept is the least that passes between sending and reading; a gap may be shorter, when this
        # process was late to read the event before. A loop may wake a clock tick early.
        assert record.time_to_first_token is not None
        assert record.time_to_first_token > 0.018
        assert record.latency is not None
        assert record.latency > 0.036
        assert min(record.gaps()) > 0
        assert record.time_per_token is not None
        assert record.time_per_token == pytest.approx((record.latency - record.time_to_first_token) / 2)
        assert record.start < record.text_times[0] < record.text_times[-1] <= record.end
    first, second = result.records
    assert second.start >= first.end
    assert result.duration == pytest.approx(second.end - first.start)
    assert result.client_cpu > 0


def test_warmup_is_sent_before_and_not_counted() -> None:
    seen: list[RequestRecord] = []
    with CannedServer().running() as server:
        result = load(server, LoadPlan(concurrency=2), count=3, warmup=4, seen=seen)
    assert ["warm" in body for body in server.bodies] == [True] * 4 + [False] * 3
    assert len(result.records) == len(seen) == 3
    assert len(result.warmup) == 4
    assert min(record.start for record in result.records) >= max(record.end for record in result.warmup)


def test_when_every_warmup_fails_nothing_is_measured() -> None:
    server = CannedServer(script=lambda _: JSONResponse({"error": {"message": "no such model"}}, status_code=404))
    with server.running(), pytest.raises(WarmupError, match="HTTP 404: no such model"):
        load(server, LoadPlan(concurrency=1), count=3, warmup=2)
    assert len(server.bodies) == 2


def test_failures_are_told_apart_and_the_others_go_on() -> None:
    whole = whole_answer(0)
    scripts: dict[int, Answer] = {
        0: whole,
        1: [role() + text("a"), event({"error": {"message": "step failed"}}) + DONE],
        2: [role() + text("a"), RuntimeError("cut")],
        3: JSONResponse({"error": {"message": "boom"}}, status_code=500),
        4: JSONResponse({"error": {"message": "queue full"}}, status_code=429, headers={"retry-after": "1"}),
        5: [role() + text("a"), usage(1, 1) + DONE],
        6: [role() + text("a", "stop")],
        7: whole,
    }
    with CannedServer(script=scripts.__getitem__).running() as server:
        result = load(server, LoadPlan(concurrency=1), count=8)
    assert [record.error for record in result.records] == [
        None,
        "error event: step failed",
        "ConnectionError: the connection was closed before the answer was complete",
        "HTTP 500: boom",
        "HTTP 429: queue full",
        "stream ended without a finish_reason",
        "stream ended without [DONE]",
        None,
    ]


def test_a_silent_server_fails_the_request() -> None:
    with CannedServer(script=lambda _: [role(), 0.5, text("late", "stop") + DONE]).running() as server:
        result = load(server, LoadPlan(concurrency=1, timeout=0.1), count=1)
    assert result.records[0].error == "TimeoutError: nothing arrived for 0.1 s"


def test_open_loop_sends_on_time_while_others_run() -> None:
    plan = LoadPlan(request_rate=50.0, arrival="constant")
    slow: Answer = [0.5, text("a", "stop") + DONE]
    with CannedServer(script=lambda _: slow).running() as server:
        result = load(server, plan, count=6)
    assert server.peak == result.peak_in_flight == 6  # all within 0.1 s, each for 0.5 s
    for record, offset in zip(result.records, [0.0, 0.02, 0.04, 0.06, 0.08, 0.1], strict=True):
        assert record.due - result.records[0].due == pytest.approx(offset)
        assert record.start >= record.due


def test_open_loop_holds_back_at_its_limit_and_says_so() -> None:
    plan = LoadPlan(request_rate=200.0, arrival="constant", max_concurrency=2)
    with CannedServer(script=lambda _: [0.1, text("a", "stop") + DONE]).running() as server:
        result = load(server, plan, count=6)
    assert server.peak == result.peak_in_flight == 2
    assert result.records[-1].start - result.records[-1].due > 0.05


def test_arrivals_are_a_matter_of_the_seed() -> None:
    def offsets(seed: int) -> list[float]:
        return arrival_offsets(rate=4.0, count=200, arrival="poisson", seed=seed)

    assert offsets(1) == offsets(1)
    assert offsets(1) != offsets(2)


def test_poisson_arrivals_offer_the_rate_asked_for_and_cluster() -> None:
    offsets = arrival_offsets(rate=4.0, count=2001, arrival="poisson", seed=3)
    gaps = [later - earlier for earlier, later in itertools.pairwise(offsets)]
    assert offsets[0] == 0.0
    assert offsets[-1] == pytest.approx(500.0)
    assert min(gaps) >= 0.0
    assert statistics.stdev(gaps) == pytest.approx(0.25, rel=0.1)  # of exponential gaps it is their mean


def test_constant_arrivals_are_even() -> None:
    assert arrival_offsets(rate=4.0, count=4, arrival="constant", seed=0) == [0.0, 0.25, 0.5, 0.75]
    assert arrival_offsets(rate=4.0, count=1, arrival="poisson", seed=0) == [0.0]
    with pytest.raises(ValueError, match="above 0"):
        arrival_offsets(rate=0.0, count=4, arrival="constant", seed=0)


@pytest.mark.parametrize("plan", [{}, {"concurrency": 2, "request_rate": 1.0}])
def test_a_plan_is_either_closed_or_open(plan: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="either"):
        LoadPlan(**plan)  # type: ignore[arg-type]
