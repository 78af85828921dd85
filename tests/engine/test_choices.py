"""Several answers to one prompt, answers that wait for a grammar, and log-probabilities, all without a model."""

from __future__ import annotations

import pytest

from server.engine.core import AbortRequests, EngineCore, Prepared
from server.engine.scheduler import Scheduler
from server.types import EngineOutput, FinishReason, GrammarSpec
from tests.factories import FakeExecutor, expected_answer, make_core, make_request, make_scheduler, make_tile

SCHEMA = GrammarSpec("json_schema", "{}")


def run(scheduler: Scheduler, executor: FakeExecutor) -> dict[str, list[EngineOutput]]:
    """Step until nothing is left to do; outputs by answer."""
    found: dict[str, list[EngineOutput]] = {}
    while scheduler.has_work:
        plan = scheduler.schedule()
        for output in scheduler.update(plan, executor.execute(plan)):
            found.setdefault(output.request_id, []).append(output)
        scheduler.check_integrity()
    return found


def tokens(outputs: list[EngineOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]


# -- one prompt, several answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("caching", [True, False])
def test_the_prompt_is_computed_once_and_its_blocks_are_shared(caching: bool) -> None:
    scheduler, executor = make_scheduler(enable_prefix_caching=caching, num_tile_slots=2), FakeExecutor()
    request = make_request(range(100, 111), tiles=["a", "b"], max_tokens=3, n=3)  # 22 ids: five blocks and two more
    scheduler.add(request)
    found = run(scheduler, executor)
    assert {name: tokens(outputs) for name, outputs in found.items()} == dict.fromkeys(
        request.choice_ids, expected_answer(request)
    )
    assert executor.encoded == [make_tile("a").key, make_tile("b").key]
    chunks = dict.fromkeys(request.choice_ids, 0)
    tables = {name: [] for name in request.choice_ids}
    for step in executor.steps:
        for item in step.scheduled:
            chunks[item.request_id] += item.num_tokens
            tables[item.request_id] += item.new_block_ids
    assert chunks == dict(zip(request.choice_ids, (24, 4, 4), strict=True))
    first, *others = (table[:6] for table in tables.values())
    assert all(table[:5] == first[:5] and table[5] != first[5] for table in others)
    assert scheduler.holds_nothing


def test_while_the_prompt_is_computed_the_others_hold_nothing_and_then_all_run() -> None:
    scheduler, executor = make_scheduler(max_num_batched_tokens=8, max_num_seqs=4), FakeExecutor()
    scheduler.add(make_request(range(100, 121), max_tokens=9, n=4))
    for expected_running in (1, 1, 1, 4):
        plan = scheduler.schedule()
        assert scheduler.num_running == expected_running
        scheduler.update(plan, executor.execute(plan))
        scheduler.check_integrity()


def test_a_first_answer_of_one_token_leaves_its_blocks_to_the_others() -> None:
    scheduler, executor = make_scheduler(), FakeExecutor()
    request = make_request(range(100, 120), max_tokens=1, n=3)
    scheduler.add(request)
    assert set(run(scheduler, executor)) == set(request.choice_ids)
    assert sum(item.num_tokens for step in executor.steps for item in step.scheduled) == 20 + 4 + 4


@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_answer_can_be_cancelled_at_any_time_and_the_others_go_on(which: int) -> None:
    for after in range(6):
        scheduler, executor = make_scheduler(max_num_batched_tokens=8), FakeExecutor()
        request = make_request(range(100, 120), max_tokens=4, n=3)
        scheduler.add(request)
        for _ in range(after):
            plan = scheduler.schedule()
            scheduler.update(plan, executor.execute(plan))
        scheduler.abort([request.choice_ids[which]])
        scheduler.check_integrity()
        left = set(request.choice_ids) - {request.choice_ids[which]}
        assert left <= set(run(scheduler, executor)) | {o for o in request.choice_ids if o not in scheduler._requests}
        assert scheduler.holds_nothing


def test_when_the_prompt_fails_all_fail() -> None:
    scheduler, executor = make_scheduler(), FakeExecutor()
    executor.broken_tiles = {make_tile("bad").key}
    request = make_request(4, tiles=["bad"], n=3)
    scheduler.add(request)
    found = run(scheduler, executor)
    assert {name: outputs[-1].finish_reason for name, outputs in found.items()} == dict.fromkeys(
        request.choice_ids, FinishReason.ERROR
    )


def test_others_stand_before_later_requests() -> None:
    scheduler, executor = make_scheduler(max_num_seqs=1), FakeExecutor()
    several, later = make_request(8, max_tokens=2, n=2), make_request(8, max_tokens=2)
    scheduler.add(several)
    scheduler.add(later)
    assert list(run(scheduler, executor)) == [*several.choice_ids, later.request_id]


def test_an_id_that_an_answer_has_is_in_use() -> None:
    scheduler = make_scheduler()
    request = make_request(8, n=2)
    scheduler.add(request)
    with pytest.raises(ValueError, match="in use"):
        scheduler.add(make_request(8, request_id=request.choice_ids[1]))


# -- held for a grammar ---------------------------------------------------------------------------------------------


def drain(core: EngineCore) -> list[EngineOutput]:
    """Handle what is in the inbox, then step until there is nothing to do."""
    found = []
    while not core.inbox.empty():
        output = core.handle(core.inbox.get())
        if output is not None:
            found.append(output)
    while core.scheduler.has_work:
        found += core.step().outputs
        core.scheduler.check_integrity()
    core.executor.forget(core.scheduler.take_finished())
    return found


def executor_of(core: EngineCore) -> FakeExecutor:
    assert isinstance(core.executor, FakeExecutor)
    return core.executor


def test_a_request_with_a_grammar_waits_until_it_is_compiled_while_others_run() -> None:
    core = make_core()
    request, other = make_request(8, grammar=SCHEMA), make_request(8)
    core.inbox.put(request)
    core.inbox.put(other)
    assert {output.request_id for output in drain(core)} == {other.request_id}
    assert core.scheduler.num_waiting == 1
    executor_of(core).prepared[request.request_id](None)
    assert tokens(drain(core)) == expected_answer(request)
    assert core.scheduler.num_waiting == 0


def test_a_grammar_that_does_not_compile_fails_its_request_and_nobody_else() -> None:
    core = make_core()
    request = make_request(8, grammar=SCHEMA)
    core.inbox.put(request)
    drain(core)
    executor_of(core).prepared[request.request_id]("too large")
    (output,) = drain(core)
    assert (output.finish_reason, output.error) == (FinishReason.ERROR, "too large")
    assert not core.scheduler.has_work
    assert core.scheduler.num_waiting == 0


@pytest.mark.parametrize("failure", [None, "too large"])
def test_a_client_that_left_before_its_grammar_was_compiled_is_forgotten(failure: str | None) -> None:
    core = make_core()
    request = make_request(8, grammar=SCHEMA, n=2)
    core.inbox.put(request)
    drain(core)
    done = executor_of(core).prepared[request.request_id]
    core.inbox.put(AbortRequests(list(request.choice_ids)))
    assert drain(core) == []
    assert not executor_of(core).prepared, "the executor was not told"
    done(failure)
    assert drain(core) == []
    assert core.scheduler.num_waiting == 0


def test_a_second_word_about_a_grammar_changes_nothing() -> None:
    core = make_core()
    request = make_request(8, grammar=SCHEMA)
    core.inbox.put(request)
    core.inbox.put(Prepared(request.request_id, None))
    core.inbox.put(Prepared(request.request_id, None))
    assert tokens(drain(core)) == expected_answer(request)


def test_a_complete_grammar_ends_the_answer() -> None:
    core = make_core()
    request = make_request(8, max_tokens=9, ignore_eos=True)
    executor_of(core).completing = {expected_answer(request)[2]}
    core.inbox.put(request)
    outputs = drain(core)
    assert tokens(outputs) == expected_answer(request)[:3]
    assert (outputs[-1].finish_reason, outputs[-1].stop_token_id) == (FinishReason.STOP, None)


# -- log-probabilities ----------------------------------------------------------------------------------------------


def test_each_token_has_its_entry_and_the_prompt_comes_chunk_by_chunk_once() -> None:
    scheduler, executor = make_scheduler(max_num_batched_tokens=8), FakeExecutor()
    request = make_request(range(100, 121), max_tokens=3, num_logprobs=0, num_prompt_logprobs=0)
    scheduler.add(request)
    outputs = run(scheduler, executor)[request.request_id]
    assert [len(output.prompt_logprobs) for output in outputs] == [8, 8, 4, 0, 0]
    told = [entry for output in outputs for entry in output.prompt_logprobs]
    assert [(entry.token_id, entry.logprob) for entry in told] == [(100 + p, -float(p)) for p in range(1, 21)]
    assert [[entry.token_id for entry in output.logprobs] for output in outputs] == [
        output.new_token_ids for output in outputs
    ]


def test_a_cached_prefix_is_computed_again_where_its_logprobs_are_wanted() -> None:
    scheduler, executor = make_scheduler(), FakeExecutor()
    scheduler.add(make_request(range(100, 121), max_tokens=1))
    run(scheduler, executor)
    request = make_request(range(100, 121), max_tokens=1, num_prompt_logprobs=0)
    scheduler.add(request)
    (output,) = run(scheduler, executor)[request.request_id]
    assert len(output.prompt_logprobs) == 20
    assert output.num_cached_tokens == 0


def test_a_preemption_tells_no_entry_twice_and_loses_none() -> None:
    scheduler = make_scheduler(num_blocks=16, max_model_len=64, max_num_batched_tokens=8)
    executor, preemptions = FakeExecutor(), 0
    requests = [make_request(range(i * 50, i * 50 + 20), max_tokens=40, num_prompt_logprobs=0) for i in range(3)]
    for request in requests:
        scheduler.add(request)
    told: dict[str, list[float]] = {}
    while scheduler.has_work:
        plan = scheduler.schedule()
        for output in scheduler.update(plan, executor.execute(plan)):
            told.setdefault(output.request_id, []).extend(entry.logprob for entry in output.prompt_logprobs)
        preemptions += scheduler.take_stats().num_preemptions
    assert preemptions
    assert told == {request.request_id: [-float(p) for p in range(1, 20)] for request in requests}


def test_only_the_first_of_several_answers_tells_of_the_prompt() -> None:
    scheduler, executor = make_scheduler(), FakeExecutor()
    request = make_request(8, max_tokens=2, num_prompt_logprobs=0, n=3)
    scheduler.add(request)
    found = run(scheduler, executor)
    counts = [sum(len(output.prompt_logprobs) for output in found[name]) for name in request.choice_ids]
    assert counts == [7, 0, 0]
