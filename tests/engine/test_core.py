from __future__ import annotations

import threading

from server.engine.core import AbortRequests, EngineCore, Shutdown, ToEngine
from server.types import EngineOutputs, EngineRequest, FinishReason, PlaceholderRange
from tests.factories import FakeExecutor, expected_answer, make_core, make_request


def serve(core: EngineCore, messages: list[ToEngine]) -> list[EngineOutputs]:
    """Feed all messages, then run until idle."""
    emitted: list[EngineOutputs] = []
    for message in messages:
        output = core.handle(message)
        if output is not None:
            emitted.append(EngineOutputs(outputs=[output], stats=core.scheduler.take_stats()))
    while core.scheduler.has_work:
        emitted.append(core.step())
    return emitted


def executor_of(core: EngineCore) -> FakeExecutor:
    assert isinstance(core.executor, FakeExecutor)
    return core.executor


def test_a_step_that_breaks_ends_its_requests_and_the_engine_goes_on() -> None:
    core = make_core(max_num_seqs=2)
    poison, beside, later = make_request(4, tiles=["x"]), make_request(4), make_request(4, tiles=["x"])
    executor_of(core).explode_on = {poison.request_id}
    emitted = serve(core, [poison, beside, later])
    ends = {o.request_id: o.finish_reason for e in emitted for o in e.outputs if o.finish_reason}
    assert ends == {
        poison.request_id: FinishReason.ERROR,
        beside.request_id: FinishReason.ERROR,
        later.request_id: FinishReason.LENGTH,
    }
    core.scheduler.check_integrity()
    assert core.scheduler.holds_nothing


def test_a_refused_request_is_told_so() -> None:
    core = make_core()
    (emitted,) = serve(core, [make_request(500)])
    assert emitted.outputs[0].finish_reason is FinishReason.ERROR


def test_run_serves_forgets_and_leaves() -> None:
    core = make_core()
    inbox = core.inbox
    emitted: list[EngineOutputs] = []
    done = threading.Event()
    first, second = make_request(4, max_tokens=3), make_request(4, max_tokens=64)

    def emit(outputs: EngineOutputs) -> None:
        emitted.append(outputs)
        if any(o.request_id == first.request_id and o.finish_reason for o in outputs.outputs):
            inbox.put(AbortRequests([second.request_id]))
            done.set()

    thread = threading.Thread(target=core.run, args=(emit,))
    thread.start()
    inbox.put(first)
    inbox.put(second)
    assert done.wait(10)
    inbox.put(Shutdown())
    thread.join(10)
    assert not thread.is_alive()
    tokens = [t for e in emitted for o in e.outputs if o.request_id == first.request_id for t in o.new_token_ids]
    assert tokens == expected_answer(first)
    assert not core.scheduler.has_work
    assert not executor_of(core).tokens, "the runner keeps requests that have ended"
    assert sum(e.stats.num_generated_tokens for e in emitted) >= 3


def test_a_request_whose_tiles_have_no_place_is_refused_and_ends_nobody_else() -> None:
    core = make_core()
    whole = make_request(12, tiles=["a"])
    broken = [
        EngineRequest(**{**{name: getattr(whole, name) for name in whole.__struct_fields__}, **changes})
        for changes in (
            {"request_id": "no place", "placeholders": ()},
            {"request_id": "no tile", "tiles": ()},
            {"request_id": "beyond the prompt", "placeholders": (PlaceholderRange(1000, 4),)},
        )
    ]
    fine = make_request(8)
    emitted = serve(core, [*broken, fine])
    ends = {o.request_id: o.finish_reason for e in emitted for o in e.outputs if o.finish_reason}
    assert ends == {**{item.request_id: FinishReason.ERROR for item in broken}, fine.request_id: FinishReason.LENGTH}
