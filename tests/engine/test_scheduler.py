"""Policy, one rule a test, on an executor that checks every plan."""

from __future__ import annotations

import random

import pytest

from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.step import ModelRunnerOutput, SchedulerOutput
from server.types import EngineRequest, FinishReason
from tests.factories import FakeExecutor, expected_answer, make_limits, make_request, make_scheduler, make_tile


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
    scheduler, executor = make_scheduler(max_num_batched_tokens=8, max_num_batched_tiles=1), FakeExecutor()
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
    scheduler, executor = make_scheduler(max_num_batched_tiles=1), FakeExecutor()
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
    scheduler, executor = make_scheduler(max_num_batched_tiles=2), FakeExecutor()
    scheduler.add(make_request(4, tiles=["a", "a"], max_tokens=1))
    run(scheduler, executor)
    assert executor.encoded == [make_tile("a").key]
    assert scheduler.holds_nothing


def test_more_tiles_than_slots_still_finish() -> None:
    scheduler, executor = make_scheduler(num_tile_slots=1, max_num_batched_tiles=4), FakeExecutor()
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
    scheduler, executor = make_scheduler(max_num_batched_tiles=2), FakeExecutor()
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


def random_limits(rng: random.Random) -> SchedulerLimits:
    return make_limits(
        num_blocks=rng.choice([16, 24, 40]),
        max_model_len=64,
        max_num_seqs=rng.choice([2, 4, 8]),
        max_num_batched_tokens=rng.choice([8, 16, 64]),
        max_num_batched_tiles=rng.choice([1, 3]),
        num_tile_slots=rng.choice([1, 3, 8]),
        enable_prefix_caching=rng.random() < 0.8,
    )


def test_100_000_random_operations_leak_nothing() -> None:
    """Adds, cancels, finishes, preemptions and prefix hits at random; the books are checked after each."""
    seen = dict.fromkeys(("add", "abort", "finish", "preempt", "prefix hit", "tile hit"), 0)
    operations = 0
    for seed in range(20):
        rng = random.Random(seed)
        scheduler, executor = Scheduler(random_limits(rng)), FakeExecutor()
        alive: list[EngineRequest] = []
        wanted: dict[str, list[int]] = {}
        answers: dict[str, list[int]] = {}
        for _ in range(5_000):
            operations += 1
            roll = rng.random()
            if roll < 0.15 and len(alive) < 12:
                start = rng.choice([0, 0, 300])  # few distinct beginnings: many prefix hits
                request = make_request(
                    range(start, start + rng.randint(1, 20)),
                    tiles=[rng.choice("abcdef") for _ in range(rng.choice([0, 0, 1, 3]))],
                    max_tokens=rng.randint(1, 24),
                    priority=rng.choice([0, 0, 1]),
                )
                scheduler.add(request)
                alive.append(request)
                wanted[request.request_id] = expected_answer(request)
                seen["add"] += 1
            elif roll < 0.19 and alive:
                victim = alive.pop(rng.randrange(len(alive)))
                scheduler.abort([victim.request_id])
                wanted.pop(victim.request_id)
                seen["abort"] += 1
            elif scheduler.has_work:
                plan = scheduler.schedule()
                for output in scheduler.update(plan, executor.execute(plan)):
                    answers.setdefault(output.request_id, []).extend(output.new_token_ids)
                    if output.finish_reason:
                        alive = [request for request in alive if request.request_id != output.request_id]
                        assert answers[output.request_id] == wanted.pop(output.request_id)
                        seen["finish"] += 1
                stats = scheduler.take_stats()
                seen["preempt"] += stats.num_preemptions
                seen["prefix hit"] += stats.prefix_hits > 0
                seen["tile hit"] += stats.tile_hits
            scheduler.check_integrity()
        scheduler.abort([request.request_id for request in alive])
        scheduler.check_integrity()
        assert scheduler.holds_nothing
    assert operations == 100_000
    assert min(seen.values()) > 300, seen


@pytest.mark.xfail(strict=True, reason="a tile that the plan itself pushes out of the cache is not counted")
def test_no_step_encodes_more_tiles_than_its_budget() -> None:
    scheduler, executor = make_scheduler(max_num_batched_tiles=1, num_tile_slots=3), FakeExecutor()
    for name in ("old", "x", "y"):  # the cache is full, `old` is the next to go
        scheduler.add(make_request(range(ord(name[0]), ord(name[0]) + 4), tiles=[name], max_tokens=1))
        run(scheduler, executor)
    for tiles in (["new", "old"], ["more"], ["and more"]):
        scheduler.add(make_request(4, tiles=tiles, max_tokens=1))
    while scheduler.has_work:
        step(scheduler, executor)
        assert len(executor.steps[-1].tiles) <= 1


class StrictExecutor(FakeExecutor):
    """A slot whose tile could not be encoded holds what it held before."""

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        result = super().execute(step)
        for item in step.tiles:
            if self.sources[item.request_id].tiles[item.index].key in self.broken_tiles:
                self.slots[item.slot] = b"the last one's picture"
        return result


@pytest.mark.xfail(strict=True, reason="nobody is told that the tile failed, and its slot passes for encoded")
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
        StrictExecutor(),
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
