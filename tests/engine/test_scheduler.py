"""Policy, one rule a test, on an executor that checks every plan."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from server.engine.request import Request
from server.engine.scheduler import Scheduler
from server.engine.step import ModelRunnerOutput
from server.types import EngineOutput, EngineRequest, FinishReason, PlaceholderRange, RequestOrigin, StepStats
from tests.engine.operations import KINDS, live
from tests.factories import (
    IMAGE_ID,
    FakeExecutor,
    expected_answer,
    make_limits,
    make_request,
    make_scheduler,
    make_tile,
)


def step(scheduler: Scheduler, executor: FakeExecutor) -> dict[str, list[int]]:
    """One step; integrity is checked before and after. Returns new tokens by request."""
    plan = scheduler.schedule()
    scheduler.check_integrity()
    outputs = scheduler.update(plan, executor.execute(plan))
    scheduler.check_integrity()
    return {output.request_id: output.new_token_ids for output in outputs}


def run(scheduler: Scheduler, executor: FakeExecutor, limit: int = 10_000) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {}
    for _ in range(limit):
        if not scheduler.has_work:
            return answers
        for request_id, tokens in step(scheduler, executor).items():
            answers.setdefault(request_id, []).extend(tokens)
    raise AssertionError("no end in sight")


def test_one_request_from_prompt_to_last_token() -> None:
    scheduler, executor = make_scheduler(), FakeExecutor()
    request = make_request(10, max_tokens=5)
    scheduler.add(request)
    assert run(scheduler, executor) == {request.request_id: expected_answer(request)}
    assert scheduler.holds_nothing
    assert len(executor.steps) == 5


def test_a_long_prompt_is_chunked_and_decodes_go_on() -> None:
    scheduler, executor = make_scheduler(max_num_batched_tokens=8), FakeExecutor()
    short, long = make_request(4, max_tokens=20), make_request(range(500, 560), max_tokens=2)
    scheduler.add(short)
    step(scheduler, executor)
    scheduler.add(long)
    while scheduler.num_running < 2 or long.request_id not in step(scheduler, executor):
        produced = step(scheduler, executor)
        assert short.request_id in produced, "a decode missed a step while a prompt was computed"
        assert sum(item.num_tokens for item in executor.steps[-1].scheduled) <= 8


def test_decodes_come_first_even_behind_an_older_prefill() -> None:
    scheduler, executor = make_scheduler(max_num_batched_tokens=8, max_num_batched_pixels=1), FakeExecutor()
    # The older request waits for tiles, so that the younger one starts decoding beside it.
    older = make_request(60, tiles=["a", "b", "c", "d"], max_tokens=2)
    younger = make_request(3, max_tokens=30)
    scheduler.add(older)
    scheduler.add(younger)
    for _ in range(6):
        produced = step(scheduler, executor)
    assert executor.steps[-1].scheduled[0].request_id == younger.request_id
    assert younger.request_id in produced
    assert executor.steps[-1].scheduled[-1].request_id == older.request_id


def test_one_tile_a_step_and_the_chunk_ends_before_the_next() -> None:
    scheduler, executor = make_scheduler(max_num_batched_pixels=1), FakeExecutor()
    request = make_request(6, tiles=["a", "b", "c"], max_tokens=1)
    scheduler.add(request)
    chunks = []
    while scheduler.has_work:
        step(scheduler, executor)
        assert len(executor.steps[-1].tiles) <= 1
        chunks.append(executor.steps[-1].scheduled[0].num_tokens)
    assert chunks == [7, 5, 10]  # ids: text, FAKE, 4 rows, FAKE | 4 rows, FAKE | 4 rows, FAKE, 5 texts
    assert executor.encoded == [make_tile(name).key for name in "abc"]


def test_tiles_of_a_cached_prefix_are_never_encoded_again() -> None:
    scheduler, executor = make_scheduler(), FakeExecutor()
    first = make_request(9, tiles=["a", "b"], max_tokens=4)
    scheduler.add(first)
    answer = run(scheduler, executor)[first.request_id]
    follow_up = EngineRequest(
        request_id="second turn",
        prompt_token_ids=[*first.prompt_token_ids, *answer, 7, 8, 9],
        sampling=first.sampling,
        eos_token_ids=(),
        tiles=first.tiles,
        placeholders=first.placeholders,
    )
    scheduler.add(follow_up)
    plan = scheduler.schedule()
    outputs = scheduler.update(plan, executor.execute(plan))
    assert len(executor.encoded) == 2
    # 20 prompt tokens and 3 of the 4 answered ones were computed: five blocks of four.
    assert outputs[0].num_cached_tokens == 20
    assert run(scheduler, executor)


def test_a_kept_tile_is_reused_where_the_prefix_differs() -> None:
    scheduler, executor = make_scheduler(), FakeExecutor()
    scheduler.add(make_request(9, tiles=["a"], max_tokens=1))
    run(scheduler, executor)
    scheduler.add(make_request(range(700, 709), tiles=["a"], max_tokens=1))
    run(scheduler, executor)
    assert executor.encoded == [make_tile("a").key]


def test_same_tile_twice_is_encoded_once() -> None:
    scheduler, executor = make_scheduler(max_num_batched_pixels=2), FakeExecutor()
    scheduler.add(make_request(4, tiles=["a", "a"], max_tokens=1))
    run(scheduler, executor)
    assert executor.encoded == [make_tile("a").key]
    assert scheduler.holds_nothing


def test_more_tiles_than_slots_still_finish() -> None:
    scheduler, executor = make_scheduler(num_tile_slots=1, max_num_batched_pixels=4), FakeExecutor()
    requests = [make_request(5, tiles=[f"{i}{name}" for name in "abc"], max_tokens=3) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    assert run(scheduler, executor) == {request.request_id: expected_answer(request) for request in requests}


def test_preemption_recomputes_and_changes_nothing() -> None:
    scheduler, executor = make_scheduler(num_blocks=32, max_model_len=64), FakeExecutor()
    requests = [make_request(range(i * 50, i * 50 + 20), max_tokens=40) for i in range(5)]
    for request in requests:
        scheduler.add(request)
    assert run(scheduler, executor) == {request.request_id: expected_answer(request) for request in requests}
    assert scheduler.take_stats().num_preemptions > 0
    assert scheduler.holds_nothing


def test_the_oldest_request_is_never_preempted() -> None:
    scheduler, executor = make_scheduler(num_blocks=16, max_model_len=64, enable_prefix_caching=False), FakeExecutor()
    requests = [make_request(8, max_tokens=50) for _ in range(4)]
    for request in requests:
        scheduler.add(request)
    finished: list[str] = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        outputs = scheduler.update(plan, executor.execute(plan))
        finished += [output.request_id for output in outputs if output.finish_reason]
    assert finished == [request.request_id for request in requests]
    assert scheduler.take_stats().num_preemptions > 0


def test_priority_goes_before_arrival() -> None:
    scheduler, executor = make_scheduler(max_num_seqs=1), FakeExecutor()
    late = make_request(4, max_tokens=1, priority=5)
    urgent = make_request(4, max_tokens=1, priority=-1)
    normal = make_request(4, max_tokens=1)
    for request in (late, urgent, normal):
        scheduler.add(request)
    assert list(run(scheduler, executor)) == [urgent.request_id, normal.request_id, late.request_id]


def test_first_come_first_served_even_when_a_later_one_would_fit() -> None:
    scheduler, executor = make_scheduler(num_blocks=16, max_model_len=64, enable_prefix_caching=False), FakeExecutor()
    running, big, small = make_request(40, max_tokens=8), make_request(40, max_tokens=1), make_request(4, max_tokens=1)
    for request in (running, big, small):
        scheduler.add(request)
    order = list(run(scheduler, executor))
    assert order == [running.request_id, big.request_id, small.request_id]


@pytest.mark.parametrize("after_steps", [0, 1, 2, 4])
def test_cancel_at_any_moment_gives_everything_back(after_steps: int) -> None:
    scheduler, executor = make_scheduler(max_num_batched_tokens=8), FakeExecutor()
    request = make_request(20, tiles=["a", "b"], max_tokens=50)
    scheduler.add(request)
    for _ in range(after_steps):
        step(scheduler, executor)
    scheduler.abort([request.request_id, "unknown"])
    scheduler.check_integrity()
    assert scheduler.holds_nothing
    assert not scheduler.has_work
    executor.forget(scheduler.take_finished())
    assert not executor.tokens


def test_a_cancel_between_plan_and_result_is_harmless() -> None:
    scheduler, executor = make_scheduler(), FakeExecutor()
    request, other = make_request(8), make_request(8)
    scheduler.add(request)
    scheduler.add(other)
    plan = scheduler.schedule()
    result = executor.execute(plan)
    scheduler.abort([request.request_id])
    assert [output.request_id for output in scheduler.update(plan, result)] == [other.request_id]
    scheduler.check_integrity()


def test_eos_stop_ids_ignore_eos_and_length() -> None:
    request = make_request(8, max_tokens=6)
    answer = expected_answer(request)

    def finish(**changes: object) -> tuple[list[int], FinishReason | None, int | None]:
        scheduler, executor = make_scheduler(), FakeExecutor()
        scheduler.add(make_request(8, max_tokens=6, **changes))  # type: ignore[arg-type]
        tokens: list[int] = []
        while True:
            plan = scheduler.schedule()
            (output,) = scheduler.update(plan, executor.execute(plan))
            tokens += output.new_token_ids
            if output.finish_reason:
                return tokens, output.finish_reason, output.stop_token_id

    assert finish() == (answer, FinishReason.LENGTH, None)
    assert finish(eos=(answer[2],)) == (answer[:3], FinishReason.STOP, answer[2])
    assert finish(eos=(answer[2],), ignore_eos=True) == (answer, FinishReason.LENGTH, None)
    assert finish(stop_token_ids=(answer[1],), ignore_eos=True) == (answer[:2], FinishReason.STOP, answer[1])


def test_a_broken_tile_fails_its_requests_and_nobody_else() -> None:
    scheduler, executor = make_scheduler(max_num_batched_pixels=2), FakeExecutor()
    executor.broken_tiles = {make_tile("bad").key}
    bad, also_bad = make_request(4, tiles=["bad"]), make_request(range(40, 44), tiles=["bad"])
    good = make_request(4, tiles=["good"])
    for request in (bad, also_bad, good):
        scheduler.add(request)
    errors: dict[str, str | None] = {}
    while scheduler.has_work:
        plan = scheduler.schedule()
        for output in scheduler.update(plan, executor.execute(plan)):
            if output.finish_reason:
                errors[output.request_id] = output.error
        scheduler.check_integrity()
    assert errors == {bad.request_id: "broken tile", also_bad.request_id: "broken tile", good.request_id: None}
    # What was never encoded must not be found later.
    executor.broken_tiles = set()
    again = make_request(4, tiles=["bad"], max_tokens=1)
    scheduler.add(again)
    assert run(scheduler, executor) == {again.request_id: expected_answer(again)}


def test_requests_that_break_a_limit_are_refused() -> None:
    scheduler = make_scheduler(max_model_len=64)
    for request in (make_request(60, max_tokens=5), make_request(8, max_tokens=0), make_request([], max_tokens=1)):
        with pytest.raises(ValueError, match="do not fit"):
            scheduler.add(request)
    scheduler.add(make_request(60, max_tokens=4, request_id="twice"))
    with pytest.raises(ValueError, match="in use"):
        scheduler.add(make_request(4, request_id="twice"))


def test_limits_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot hold"):
        make_limits(num_blocks=8, max_model_len=64)
    with pytest.raises(ValueError, match="max_num_seqs"):
        make_limits(max_num_batched_tokens=4)


def test_100_000_random_operations_leak_nothing() -> None:
    """Adds, cancels, finishes, preemptions, deferrals, failures and prefix hits; the books are checked after each.

    Some requests want several answers, and some are held for a while, as those with a grammar are.
    """
    seen: Counter[str] = Counter()
    for seed in range(20):
        seen.update(live(seed, 5_000))
    assert min(seen[kind] for kind in KINDS) > 100, seen


# -- what a plan says and what it leaves alone ----------------------------------------------------------------------


def plan_of(scheduler: Scheduler, executor: FakeExecutor) -> dict[str, int]:
    """One step; how many tokens each request got."""
    step(scheduler, executor)
    return {item.request_id: item.num_tokens for item in executor.steps[-1].scheduled}


def start_pictured(scheduler: Scheduler, executor: FakeExecutor, *, priority: int = 5) -> EngineRequest:
    """A request of four pictures, its first computed; the next three take a step each."""
    pictured = make_request(2, tiles=["a", "b", "c", "d"], max_tokens=1, priority=priority)
    scheduler.add(pictured)
    step(scheduler, executor)
    return pictured


def preempting_scheduler() -> Scheduler:
    """Where `start_pictured` and an urgent request of 16 tokens get in each other's way in their fourth step."""
    return make_scheduler(
        num_blocks=8, max_model_len=32, max_num_seqs=3, max_num_batched_tokens=9, enable_prefix_caching=False
    )


def test_a_step_that_preempts_starts_nobody_and_gives_its_tokens_to_others() -> None:
    scheduler, executor = preempting_scheduler(), FakeExecutor()
    pictured = start_pictured(scheduler, executor)
    urgent = make_request(range(900, 916), max_tokens=2)
    scheduler.add(urgent)
    for _ in range(2):
        step(scheduler, executor)
    behind = make_request(4, max_tokens=1)  # before the preempted one in the queue, and there is room for it
    scheduler.add(behind)
    assert plan_of(scheduler, executor) == {urgent.request_id: 3}
    assert scheduler.take_stats().num_preemptions == 1
    assert scheduler.num_waiting == 2
    assert executor.steps[-1].new_requests == []
    assert not any(item.resumed for item in executor.steps[-1].scheduled)
    assert set(run(scheduler, executor)) == {pictured.request_id, urgent.request_id, behind.request_id}


# Found by random search: (step of arrival, words, tiles, priority, max_tokens). With one slot, a running request's tile
# is planned, the request is preempted for another, and the slot goes to a third one's tile, all in one step.
SLOT_CHANGES_HANDS = [
    (0, 1, "bi", 10, 6),
    (3, 1, "", 10, 5),
    (4, 4, "j", 9, 4),
    (4, 5, "dji", 9, 1),
    (6, 2, "ild", 8, 4),
    (8, 9, "b", 7, 3),
    (9, 3, "eidb", 7, 2),
    (14, 11, "b", 6, 1),
    (14, 1, "df", 6, 1),
]


def test_a_slot_that_a_preemption_freed_goes_to_one_tile_only() -> None:
    limits = {"num_blocks": 16, "max_model_len": 40, "num_tile_slots": 1, "max_num_batched_pixels": 3}
    scheduler = make_scheduler(max_num_seqs=6, max_num_batched_tokens=16, enable_prefix_caching=False, **limits)
    executor, preemptions = FakeExecutor(), 0
    requests = [
        make_request(words, tiles=tiles, priority=priority, max_tokens=max_tokens)
        for _, words, tiles, priority, max_tokens in SLOT_CHANGES_HANDS
    ]
    answers: dict[str, list[int]] = {}
    for index in range(15):
        for request, arrival in zip(requests, SLOT_CHANGES_HANDS, strict=True):
            if arrival[0] == index:
                scheduler.add(request)
        for request_id, tokens in step(scheduler, executor).items():
            answers.setdefault(request_id, []).extend(tokens)
        preemptions += scheduler.take_stats().num_preemptions
    for request_id, tokens in run(scheduler, executor).items():
        answers.setdefault(request_id, []).extend(tokens)
    assert preemptions
    assert answers == {request.request_id: expected_answer(request) for request in requests}


def test_tokens_of_a_preempted_request_go_to_those_behind_it() -> None:
    """A step uses its whole budget while a prompt has tokens left, also where a planned decode is preempted."""
    limits = {"num_blocks": 13, "max_model_len": 48, "max_num_batched_tokens": 4}
    scheduler, executor = make_scheduler(max_num_seqs=3, enable_prefix_caching=False, **limits), FakeExecutor()
    victim = make_request(22, max_tokens=15, priority=5)
    scheduler.add(victim)
    for _ in range(6):
        step(scheduler, executor)
    urgent = make_request(range(300, 304), max_tokens=15)
    prompt = make_request(range(600, 616), max_tokens=1, priority=1)
    scheduler.add(urgent)
    scheduler.add(prompt)
    for _ in range(6):
        assert sum(plan_of(scheduler, executor).values()) == 4
    assert scheduler.take_stats().num_preemptions == 0
    assert plan_of(scheduler, executor) == {urgent.request_id: 1, prompt.request_id: 3}
    assert scheduler.take_stats().num_preemptions == 1


def test_a_step_in_which_nothing_fits_any_more_is_not_overfull() -> None:
    """Each running request keeps a block in reserve, or the newcomer would preempt somebody at once."""
    scheduler, executor = make_scheduler(num_blocks=16, max_model_len=64, enable_prefix_caching=False), FakeExecutor()
    running = make_request(31, max_tokens=4)
    scheduler.add(running)
    step(scheduler, executor)
    exact, smaller = make_request(32, max_tokens=1), make_request(24, max_tokens=1)
    scheduler.add(exact)
    assert plan_of(scheduler, executor) == {running.request_id: 1}
    scheduler.abort([exact.request_id])
    scheduler.add(smaller)
    assert smaller.request_id in plan_of(scheduler, executor)
    assert scheduler.take_stats().num_preemptions == 0


def test_what_ends_an_answer_is_masked_for_min_tokens() -> None:
    def masked(**changes: object) -> set[int]:
        scheduler = make_scheduler()
        scheduler.add(make_request(4, eos=(2, 9), **changes))  # type: ignore[arg-type]
        (new,) = scheduler.schedule().new_requests
        assert len(set(new.masked_token_ids)) == len(new.masked_token_ids)
        return set(new.masked_token_ids)

    assert masked() == {2, 9}
    assert masked(stop_token_ids=(7, 9)) == {2, 7, 9}
    assert masked(ignore_eos=True) == set()
    assert masked(ignore_eos=True, stop_token_ids=(7, 9)) == {7, 9}


def test_same_tile_twice_costs_the_budget_once() -> None:
    scheduler, executor = make_scheduler(max_num_batched_pixels=1, num_tile_slots=1), FakeExecutor()
    request = make_request(4, tiles=["a", "a"], max_tokens=1)
    scheduler.add(request)
    assert plan_of(scheduler, executor) == {request.request_id: len(request.prompt_token_ids)}


def test_the_tile_budget_is_one_for_all_requests_of_a_step() -> None:
    scheduler, executor = make_scheduler(max_num_batched_pixels=2, max_num_batched_tokens=64), FakeExecutor()
    requests = [make_request(4, tiles=[name], max_tokens=9) for name in "abc"]
    for request in requests:
        scheduler.add(request)
    step(scheduler, executor)
    assert executor.encoded == [make_tile(name).key for name in "ab"]
    step(scheduler, executor)
    assert len(executor.encoded) == 3


def test_a_tile_that_another_request_has_pinned_needs_no_slot_of_its_own() -> None:
    scheduler, executor = make_scheduler(num_tile_slots=1, max_num_batched_tokens=20), FakeExecutor()
    long = make_request(4, tiles=["a"], rows_per_tile=20, max_tokens=1)
    scheduler.add(long)
    assert plan_of(scheduler, executor) == {long.request_id: 20}  # ends in the middle of its tile
    other = make_request(range(800, 804), tiles=["a"], max_tokens=1)
    scheduler.add(other)
    assert plan_of(scheduler, executor) == {long.request_id: 6, other.request_id: 10}
    assert executor.encoded == [make_tile("a").key]


def test_a_pinned_tile_is_shared_in_the_same_step() -> None:
    scheduler, executor = make_scheduler(num_tile_slots=1, max_num_batched_tokens=64), FakeExecutor()
    requests = [make_request(range(start, start + 4), tiles=["a"], max_tokens=1) for start in (0, 50, 90)]
    for request in requests:
        scheduler.add(request)
    assert len(plan_of(scheduler, executor)) == 3
    assert executor.encoded == [make_tile("a").key]


def test_a_tile_is_pinned_exactly_while_its_rows_are_computed() -> None:
    scheduler, executor = make_scheduler(max_num_batched_tokens=8), FakeExecutor()
    # Ids: text, FAKE, 10 rows from 2 to 11, FAKE, texts; chunks end at 8, 12 and 20.
    request = make_request(9, tiles=["a"], rows_per_tile=10, max_tokens=5)
    other = make_request(range(700, 704), max_tokens=9)
    scheduler.add(request)
    step(scheduler, executor)
    assert scheduler.encoder.pin_counts() == {make_tile("a").key: 1}
    scheduler.add(other)
    for _ in range(4):
        step(scheduler, executor)
        item = next(item for item in executor.steps[-1].scheduled if item.request_id == request.request_id)
        past = item.num_computed_tokens + item.num_tokens >= 12
        assert scheduler.encoder.pin_counts() == ({} if past else {make_tile("a").key: 1})


def test_a_tile_that_ends_with_a_chunk_is_let_go_with_it() -> None:
    scheduler, executor = make_scheduler(max_num_batched_tokens=12, max_num_seqs=1), FakeExecutor()
    request = make_request(9, tiles=["a"], rows_per_tile=10, max_tokens=5)
    scheduler.add(request)
    assert plan_of(scheduler, executor) == {request.request_id: 12}  # the last row is the chunk's last token
    assert scheduler.encoder.pin_counts() == {}


def test_a_prefix_that_ends_inside_a_tile_waits_for_a_slot_as_any_other() -> None:
    scheduler, executor = make_scheduler(num_tile_slots=1, max_num_batched_tokens=64), FakeExecutor()
    first = make_request(2, tiles=["a"], rows_per_tile=10, max_tokens=1)  # rows 2 to 11: blocks 1 and 2 are within
    scheduler.add(first)
    run(scheduler, executor)
    shorter = EngineRequest(
        request_id="ends inside",
        prompt_token_ids=[*first.prompt_token_ids[:12], 5, 6, 7],
        sampling=first.sampling,
        eos_token_ids=(),
        tiles=first.tiles,
        placeholders=first.placeholders,
    )
    # Only the prefix's first block is left: the others are needed for something else, and so is the only slot.
    prefix = scheduler.kv.pool.lookup(hashes_of(scheduler, first))
    scheduler.kv.pool.release(scheduler.kv.pool.allocate(scheduler.kv.pool.num_free - 2) or [])
    other = make_request(range(600, 604), tiles=["z"], rows_per_tile=10, max_tokens=1)
    scheduler.add(other)
    scheduler.add(shorter)
    assert prefix
    plan = plan_of(scheduler, executor)
    assert other.request_id in plan
    answers = run(scheduler, executor)
    assert answers["ends inside"] == expected_answer(shorter)


def hashes_of(scheduler: Scheduler, source: EngineRequest) -> list[bytes]:
    request = Request(source, 0)
    scheduler.kv.find_prefix(request)
    return request.block_hashes


def test_what_was_cached_is_what_the_first_start_found() -> None:
    """After a preemption nearly everything is cached; that is no saving to tell a client of."""
    scheduler, executor = make_scheduler(num_blocks=16, max_model_len=64), FakeExecutor()
    for index in range(3):
        scheduler.add(make_request(range(index * 50, index * 50 + 12), max_tokens=40))
    cached: set[int] = set()
    while scheduler.has_work:
        plan = scheduler.schedule()
        cached |= {output.num_cached_tokens for output in scheduler.update(plan, executor.execute(plan))}
    stats = scheduler.take_stats()
    assert stats.num_preemptions > 0
    assert stats.prefix_queries == 36
    assert stats.prefix_hits == 0
    assert cached == {0}


def test_waiting_time_is_said_once() -> None:
    now = [100.0]
    scheduler, executor = Scheduler(make_limits(max_num_batched_tokens=8), clock=lambda: now[0]), FakeExecutor()
    request = EngineRequest(
        request_id="r",
        prompt_token_ids=list(range(12)),
        sampling=make_request(4, max_tokens=3).sampling,
        eos_token_ids=(),
        arrival_time=97.5,
    )
    scheduler.add(request)
    seconds = []
    while scheduler.has_work:
        plan = scheduler.schedule()
        now[0] += 1
        seconds += [output.queue_seconds for output in scheduler.update(plan, executor.execute(plan))]
    assert seconds == [2.5, None, None]


def test_counts_are_of_one_step_and_gauges_of_now() -> None:
    scheduler, executor = make_scheduler(max_num_batched_tokens=16, max_num_seqs=1), FakeExecutor()
    first, second = make_request(12, tiles=["a"], max_tokens=3), make_request(4, max_tokens=1)
    scheduler.add(first)
    scheduler.add(second)
    prompt = len(first.prompt_token_ids)
    computed = [16, prompt - 16, 1, 1, 4, 0]
    expected = [
        {
            "num_prompt_tokens": 16,
            "num_encoded_tiles": 1,
            "num_tile_shares": 1,
            "tile_queries": 1,
            "prefix_queries": prompt,
        },
        {"num_prompt_tokens": prompt - 16, "num_generated_tokens": 1},
        {"num_generated_tokens": 1},
        {"num_generated_tokens": 1},
        {"num_prompt_tokens": 4, "num_generated_tokens": 1, "prefix_queries": 4},
        {},
    ]
    for index, counts in enumerate(expected):
        step(scheduler, executor)
        stats = scheduler.take_stats(step_seconds=0.5, encode_seconds=0.25)
        running = 1 if index < 3 else 0
        waiting = 1 if index < 4 else 0
        blocks = 0 if not running else -(-min(16 + 16 * index, prompt + max(index - 1, 0)) // 4)
        assert stats == StepStats(
            num_running=running,
            num_waiting=waiting,
            num_blocks=64,
            num_used_blocks=blocks,
            num_computed_tokens=computed[index],
            step_seconds=0.5,
            encode_seconds=0.25,
            **counts,
        ), index


def test_when_a_step_breaks_a_preempted_requests_tile_is_not_reused() -> None:
    scheduler, executor = preempting_scheduler(), FakeExecutor()
    pictured = start_pictured(scheduler, executor)
    urgent = make_request(range(900, 916), max_tokens=2)
    scheduler.add(urgent)
    for _ in range(2):
        step(scheduler, executor)
    plan = scheduler.schedule()
    assert [scheduler.num_waiting, len(plan.tiles)] == [1, 1], "the tile's request is not preempted"
    outputs = scheduler.fail_step(plan, "broken")
    assert [(output.request_id, output.error) for output in outputs] == [(urgent.request_id, "broken")]
    scheduler.check_integrity()
    assert run(scheduler, executor) == {pictured.request_id: expected_answer(pictured)}


def test_who_takes_a_running_requests_place_starts_though_that_one_is_next_in_the_queue() -> None:
    """A key that has had much gives up its turn to one that has had little, but not the place it has been given."""
    scheduler, executor = make_scheduler(max_num_seqs=2), FakeExecutor()
    much, little = RequestOrigin(key="much"), RequestOrigin(key="little")
    scheduler.add(make_request(30, max_tokens=1, origin=much))
    run(scheduler, executor)
    long = [make_request(range(start, start + 4), max_tokens=20, origin=little) for start in (500, 600)]
    for request in long:
        scheduler.add(request)
    step(scheduler, executor)
    newcomer = make_request(range(700, 704), max_tokens=2, origin=much)
    scheduler.add(newcomer)
    assert set(plan_of(scheduler, executor)) == {long[0].request_id, newcomer.request_id}
    answers = run(scheduler, executor)
    assert scheduler.take_stats().num_preemptions >= 1
    assert answers[newcomer.request_id] == expected_answer(newcomer)[1:]


# -- tiles that are too large for a step ------------------------------------------------------------------------------


def test_a_large_tile_takes_several_steps_and_streams_go_on() -> None:
    scheduler, executor = make_scheduler(max_num_batched_pixels=10), FakeExecutor()
    short = make_request(4, max_tokens=20)
    scheduler.add(short)
    step(scheduler, executor)
    pictured = make_request(9, tiles=["a", "b"], num_pixels=25, max_tokens=2)
    scheduler.add(pictured)
    key = [make_tile(name).key for name in "ab"]
    chunks, answer = [], []
    for _ in range(6):
        told = step(scheduler, executor)
        assert short.request_id in told, "a decode missed a step while a tile was encoded"
        answer += told.get(pictured.request_id, [])
        chunks += [item.num_tokens for item in executor.steps[-1].scheduled if item.request_id == pictured.request_id]
    # The second tile begins with what the last share of the first leaves.
    assert executor.shares == [(key[0], 0.4), (key[0], 0.8), (key[0], 1.0), (key[1], 0.2), (key[1], 0.6), (key[1], 1.0)]
    assert chunks == [2, 5, 13, 1]  # up to the first tile; to the second; the rest; a decode
    assert answer == expected_answer(pictured)
    run(scheduler, executor)
    assert scheduler.holds_nothing


def test_only_one_tile_is_partial_and_others_wait_for_it() -> None:
    scheduler, executor = make_scheduler(max_num_batched_pixels=10), FakeExecutor()
    requests = [
        make_request(range(start, start + 4), tiles=[name], num_pixels=pixels, max_tokens=1)
        for start, name, pixels in ((0, "large", 25), (50, "small", 3), (90, "large", 25))
    ]
    for request in requests:
        scheduler.add(request)
    assert run(scheduler, executor) == {request.request_id: expected_answer(request) for request in requests}
    # FakeExecutor raises where two are partial. The third request finds the tile that was begun for the first.
    assert executor.encoded == [make_tile("large").key, make_tile("small").key]
    assert scheduler.holds_nothing


def test_a_prompt_that_begins_with_a_large_tile_takes_its_place_and_lets_others_pass() -> None:
    scheduler, executor = make_scheduler(max_num_batched_pixels=10), FakeExecutor()
    pictured = make_request(1, tiles=["a"], num_pixels=35, max_tokens=2)
    source = EngineRequest(
        request_id="tile first",
        prompt_token_ids=[IMAGE_ID] * 4 + [5, 6],
        sampling=pictured.sampling,
        eos_token_ids=(),
        tiles=pictured.tiles,
        placeholders=(PlaceholderRange(0, 4),),
    )
    other = make_request(range(700, 704), max_tokens=3)
    scheduler.add(source)
    scheduler.add(other)
    assert plan_of(scheduler, executor) == {other.request_id: 4}
    assert scheduler.num_running == 2
    answers = run(scheduler, executor)
    assert answers["tile first"] == expected_answer(source)
    assert len(executor.shares) == 4


def test_the_partial_tile_of_a_request_that_is_cancelled_is_given_up() -> None:
    scheduler, executor = make_scheduler(max_num_batched_pixels=10, num_tile_slots=1), FakeExecutor()
    requests = [make_request(range(start, start + 4), tiles=["a"], num_pixels=25, max_tokens=1) for start in (0, 50)]
    for request in requests:
        scheduler.add(request)
    step(scheduler, executor)
    scheduler.abort([requests[0].request_id])
    scheduler.check_integrity()
    assert scheduler.encoder.num_available == 1
    # The one that shared it begins it anew, as the holder of its pixels may be gone.
    assert run(scheduler, executor) == {requests[1].request_id: expected_answer(requests[1])}
    assert executor.encoded == [make_tile("a").key]
    assert len(executor.shares) == 1 + 3


def test_a_large_tile_that_breaks_ends_its_request_at_once() -> None:
    scheduler, executor = make_scheduler(max_num_batched_pixels=10), FakeExecutor()
    executor.broken_tiles = {make_tile("bad").key}
    bad = make_request(4, tiles=["bad"], num_pixels=25)
    good = make_request(range(50, 54), tiles=["good"], num_pixels=25, max_tokens=2)
    scheduler.add(bad)
    scheduler.add(good)
    plan = scheduler.schedule()
    (output,) = scheduler.update(plan, executor.execute(plan))
    assert (output.request_id, output.error) == (bad.request_id, "broken tile")
    scheduler.check_integrity()
    assert run(scheduler, executor) == {good.request_id: expected_answer(good)}


def test_a_large_tile_without_memory_is_tried_as_often_as_a_chunk() -> None:
    scheduler, executor = make_scheduler(max_num_batched_pixels=10), FakeExecutor()
    request = make_request(4, tiles=["a"], num_pixels=25)
    scheduler.add(request)
    for _ in range(2):
        assert defer_all(scheduler) == []
        assert scheduler.holds_nothing
    (output,) = defer_all(scheduler)
    assert output.error_code == "out_of_memory"
    assert not scheduler.has_work
    executor.forget(scheduler.take_finished())


def test_a_lost_step_ends_whom_a_tile_was_encoded_for() -> None:
    scheduler, executor = make_scheduler(max_num_batched_pixels=10), FakeExecutor()
    pictured = make_request(1, tiles=["a"], num_pixels=25)
    scheduler.add(pictured)
    step(scheduler, executor)
    plan = scheduler.schedule()
    assert (len(plan.scheduled), len(plan.tiles)) == (0, 1)
    (output,) = scheduler.fail_step(plan, "lost")
    assert (output.request_id, output.error) == (pictured.request_id, "lost")
    assert scheduler.holds_nothing
    scheduler.check_integrity()


# -- too little memory ------------------------------------------------------------------------------------------------


def defer_all(scheduler: Scheduler) -> list[EngineOutput]:
    """A step for which there is no memory at all."""
    plan = scheduler.schedule()
    names = frozenset(plan.request_ids)
    slots = frozenset(tile.slot for tile in plan.tiles)
    outputs = scheduler.update(plan, ModelRunnerOutput(sampled={}, deferred=names, failed_slots=slots))
    scheduler.check_integrity()
    return outputs


def test_a_deferred_request_gives_all_back_and_keeps_its_place() -> None:
    scheduler, executor = make_scheduler(max_num_seqs=1), FakeExecutor()
    first, second = make_request(9, tiles=["a"], max_tokens=3), make_request(range(500, 509), max_tokens=1)
    scheduler.add(first)
    scheduler.add(second)
    plan_of(scheduler, executor)
    assert defer_all(scheduler) == []
    assert scheduler.holds_nothing
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 2)
    assert scheduler.take_stats().num_preemptions == 1
    answers = run(scheduler, executor)
    assert list(answers) == [first.request_id, second.request_id]
    assert answers[first.request_id] == expected_answer(first)[1:]


def test_the_third_deferral_in_a_row_ends_a_request_and_a_token_between_begins_the_count_again() -> None:
    scheduler, executor = make_scheduler(), FakeExecutor()
    request = make_request(9, max_tokens=5)
    scheduler.add(request)
    step(scheduler, executor)
    for _ in range(2):
        assert defer_all(scheduler) == []
    step(scheduler, executor)
    for _ in range(2):
        assert defer_all(scheduler) == []
    (output,) = defer_all(scheduler)
    assert (output.finish_reason, output.error_code) == (FinishReason.ERROR, "out_of_memory")
    assert output.num_preemptions == 4
    assert output.new_token_ids == []
    assert not scheduler.has_work
    assert scheduler.take_finished() == [request.request_id]


def test_a_tile_that_had_no_memory_is_not_reused_whoever_shares_it() -> None:
    """The request that it was planned for fails for another reason; the one that shares it is deferred."""
    scheduler, executor = make_scheduler(max_num_batched_pixels=2, max_num_batched_tokens=64), FakeExecutor()
    owner, sharer = make_request(4, tiles=["x"], max_tokens=1), make_request(range(50, 54), tiles=["x"], max_tokens=1)
    scheduler.add(owner)
    scheduler.add(sharer)
    plan = scheduler.schedule()
    (tile,) = plan.tiles
    result = ModelRunnerOutput(
        sampled={},
        failed={owner.request_id: "injected"},
        deferred=frozenset({sharer.request_id}),
        failed_slots=frozenset({tile.slot}),
    )
    executor.execute(dataclasses.replace(plan, scheduled=[], tiles=[]))
    scheduler.update(plan, result)
    scheduler.check_integrity()
    assert make_tile("x").key not in scheduler.encoder
    assert run(scheduler, executor) == {sharer.request_id: expected_answer(sharer)}


# -- known faults -----------------------------------------------------------------------------------------------------


def test_no_step_encodes_more_tiles_than_its_budget() -> None:
    scheduler, executor = make_scheduler(max_num_batched_pixels=1, num_tile_slots=3), FakeExecutor()
    for name in ("old", "x", "y"):  # the cache is full, `old` is the next to go
        scheduler.add(make_request(range(ord(name[0]), ord(name[0]) + 4), tiles=[name], max_tokens=1))
        run(scheduler, executor)
    for tiles in (["new", "old"], ["more"], ["and more"]):
        scheduler.add(make_request(4, tiles=tiles, max_tokens=1))
    while scheduler.has_work:
        step(scheduler, executor)
        assert len(executor.steps[-1].tiles) <= 1


def test_a_tile_that_breaks_while_its_request_is_preempted_is_not_reused() -> None:
    scheduler, executor = (
        make_scheduler(
            num_blocks=8,
            max_model_len=32,
            max_num_seqs=2,
            max_num_batched_tokens=9,
            num_tile_slots=4,
            enable_prefix_caching=False,
        ),
        FakeExecutor(),
    )
    executor.broken_tiles = {make_tile("d").key}
    pictured = make_request(2, tiles=["a", "b", "c", "d"], max_tokens=1, priority=5)
    urgent = make_request(range(900, 916), max_tokens=2)
    scheduler.add(pictured)
    step(scheduler, executor)
    scheduler.add(urgent)
    while make_tile("d").key not in executor.encoded:
        step(scheduler, executor)
    assert scheduler.num_waiting == 1, "the request was not preempted in the step that encoded its tile"
    executor.broken_tiles = set()
    answers = run(scheduler, executor)
    assert answers[pictured.request_id] == expected_answer(pictured)


@pytest.mark.parametrize(
    "places", [[(2, 4), (5, 4)], [(7, 4), (2, 4)], [(2, 4), (2, 4)], [(2, 0), (7, 4)], [(2, 4), (9, 4)], [(2, 4)]]
)
def test_tiles_that_have_no_place_of_their_own_are_refused(places: list[tuple[int, int]]) -> None:
    whole = make_request(4, tiles=["a", "b"])  # rows 2 to 5 and 7 to 10, then FAKE and three texts: 15 ids
    source = EngineRequest(
        request_id="r",
        prompt_token_ids=whole.prompt_token_ids[:12],
        sampling=whole.sampling,
        eos_token_ids=(),
        tiles=whole.tiles,
        placeholders=tuple(PlaceholderRange(*place) for place in places),
    )
    scheduler = make_scheduler()
    with pytest.raises(ValueError, match=r"placeholders|tiles"):
        scheduler.add(source)
    assert not scheduler.has_work
