"""Whose an exception is: runs in halves by themselves, and a real runner in which one request is the culprit."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from server.engine.core import EngineCore
from server.errors import EngineBrokenError
from server.grammar.compiler import GrammarCompiler
from server.grammar.matcher import Matcher
from server.inputs.placeholders import PromptIds
from server.runner.grammars import LOST
from server.runner.isolation import Cause, Isolated, cause_of, isolate
from server.runner.model_runner import CRASHED
from server.types import EngineRequest, GrammarSpec, SamplingParams
from tests.runner.faults import (
    POISON,
    FaultySampler,
    Told,
    at_each_encoding,
    at_each_run,
    break_device,
    make_core,
    run_out_of_memory,
)
from tests.runner.test_vision_runner import make_tile

TOLERANCE = 1e-4


# -- runs in halves ---------------------------------------------------------------------------------------------------


def find(count: int, run: Callable[[Sequence[int]], object]) -> Isolated[int, list[int]]:
    """Isolate among the numbers below `count`; each that is not found to fail must be in one result."""

    def checked(items: Sequence[int]) -> list[int]:
        run(items)
        return list(items)

    found = isolate(range(count), checked, str)
    computed = [item for result in found.results for item in result]
    assert sorted([*computed, *found.broken, *found.starved]) == list(range(count))
    return found


def fail_for(*culprits: int) -> Callable[[Sequence[int]], None]:
    def run(items: Sequence[int]) -> None:
        if not set(culprits).isdisjoint(items):
            raise ValueError("injected")

    return run


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 13, 256])
def test_one_culprit_among_many_is_found_in_few_runs(count: int) -> None:
    for culprit in {0, count // 2, count - 1}:
        found = find(count, fail_for(culprit))
        assert (found.broken, found.starved) == ([culprit], [])
        assert found.num_runs <= 2 * math.ceil(math.log2(count)) + 1


@pytest.mark.parametrize("count", [1, 2, 8, 13])
def test_where_all_fail_the_runs_are_bounded(count: int) -> None:
    found = find(count, fail_for(*range(count)))
    assert (sorted(found.broken), found.num_runs) == (list(range(count)), 2 * count - 1)


def test_groups_keep_their_order_and_nothing_runs_again_that_was_computed() -> None:
    found = find(8, fail_for(3, 6))
    assert found.results == [[0, 1], [2], [4, 5], [7]]


@pytest.mark.parametrize("pair", [(0, 7), (2, 3), (4, 5)])
def test_who_fails_only_beside_another_does_not_fail(pair: tuple[int, int]) -> None:
    def run(items: Sequence[int]) -> None:
        if set(pair) <= set(items):
            raise ValueError("injected")

    found = find(8, run)
    assert (found.broken, found.starved) == ([], [])


def test_nothing_to_run_is_no_run() -> None:
    assert find(0, fail_for()).num_runs == 0


def test_a_lack_of_memory_that_passes_costs_one_more_run() -> None:
    shortages = iter([True, False])
    found = find(8, lambda items: run_out_of_memory() if next(shortages) else None)
    assert (found.broken, found.starved, found.num_runs) == ([], [], 2)


def test_what_is_too_large_together_runs_in_parts() -> None:
    found = find(8, lambda items: run_out_of_memory() if len(items) > 2 else None)
    assert (found.broken, found.starved) == ([], [])
    assert [len(result) for result in found.results] == [2, 2, 2, 2]


def test_who_has_no_memory_alone_is_not_called_broken() -> None:
    def run(items: Sequence[int]) -> None:
        if 5 in items:
            run_out_of_memory()
        fail_for(2)(items)

    found = find(8, run)
    assert (found.broken, found.starved) == ([2], [5])


def test_a_broken_device_ends_the_search_at_once() -> None:
    runs = []

    def run(items: Sequence[int]) -> None:
        runs.append(len(items))
        break_device()

    with pytest.raises(EngineBrokenError, match=r"an illegal memory access was encountered$"):
        isolate(range(8), run, str)
    assert runs == [8]


def test_what_a_failed_run_held_is_free_before_the_next() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def run(items: Sequence[int]) -> None:
        assert all(reference() is None for reference in held)
        activations = torch.zeros(8)
        held.append(weakref.ref(activations))
        if len(items) > 1:
            raise ValueError("injected")

    assert find(4, run).broken == []
    assert len(held) == 7


REAL_ERRORS: dict[str, tuple[Callable[[], object], Cause]] = {
    "the CPU's allocator": (lambda: torch.empty(1 << 50), Cause.MEMORY),
    "Python's": (lambda: bytearray(1 << 60), Cause.MEMORY),
    "a shape": (lambda: torch.zeros(2) + torch.zeros(3), Cause.ITEM),
    "an index": (lambda: torch.zeros(2)[torch.tensor([5])], Cause.ITEM),
}


@pytest.mark.parametrize("kind", REAL_ERRORS)
def test_causes_of_what_libraries_raise(kind: str) -> None:
    provoke, cause = REAL_ERRORS[kind]
    with pytest.raises(Exception) as raised:  # noqa: PT011 - whatever it is
        provoke()
    assert cause_of(raised.value) is cause


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), Cause.MEMORY),
        (torch.AcceleratorError("CUDA error: out of memory"), Cause.MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), Cause.MEMORY),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate"), Cause.MEMORY),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), Cause.DEVICE),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), Cause.DEVICE),
        (ValueError("CUDA error: a client's text"), Cause.ITEM),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), Cause.ITEM),
    ],
)
def test_causes_of_what_a_gpu_raises(error: Exception, cause: Cause) -> None:
    assert cause_of(error) is cause


# -- one request among eight ------------------------------------------------------------------------------------------

LETTERS = GrammarSpec("regex", "[a-z ]{12}", "fine")


def make(name: str, prompt: Sequence[int], **sampling: object) -> EngineRequest:
    values: dict[str, object] = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True, **sampling}
    return EngineRequest(
        request_id=name,
        prompt_token_ids=list(prompt),
        sampling=SamplingParams(**values),  # type: ignore[arg-type]
        eos_token_ids=(2,),
    )


def make_pictured(name: str, size: tuple[int, int] = (42, 56), seed: int = 1) -> EngineRequest:
    prompt = PromptIds(fake_token_id=32000, image_token_id=32001, rows_per_tile=64)
    prompt.add_ids([1, 400])
    prompt.add_tiles(1)
    prompt.add_ids([500, 501])
    return EngineRequest(
        request_id=name,
        prompt_token_ids=prompt.token_ids,
        sampling=SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True),
        eos_token_ids=(2,),
        tiles=(make_tile(*size, seed),),
        placeholders=tuple(prompt.placeholders),
    )


def others() -> list[EngineRequest]:
    """Seven that are fine, no two alike."""
    return [
        make("short", [1, 100]),
        make("sampled", range(200, 220), temperature=0.9, seed=5),
        make("narrow", range(300, 317), temperature=1.2, top_k=20, top_p=0.9, seed=6, repetition_penalty=1.3),
        make("told", range(400, 409), num_logprobs=3),
        make("prompt told", range(500, 530), num_prompt_logprobs=2, num_logprobs=0),
        make("grammar", range(600, 604), grammar=LETTERS, temperature=0.7, seed=7),
        make_pictured("pictured"),
    ]


def with_culprit(culprit: EngineRequest) -> list[EngineRequest]:
    requests = others()
    return [*requests[:5], culprit, *requests[5:]]


@pytest.fixture(scope="module")
def control(tiny_checkpoint: Path) -> Told:
    """The seven in an engine in which nothing fails."""
    return Told(make_core(tiny_checkpoint)).serve(others())


@pytest.fixture
def core(tiny_checkpoint: Path) -> EngineCore:
    return make_core(tiny_checkpoint)


def assert_nobody_else_noticed(told: Told, control: Told) -> None:
    for name in control.tokens:
        assert told.tokens[name] == control.tokens[name]
        assert told.ends[name].finish_reason is control.ends[name].finish_reason
        for kind in ("logprobs", "prompt_logprobs"):
            mine, theirs = getattr(told, kind)[name], getattr(control, kind)[name]
            assert [entry.token_id for entry in mine] == [entry.token_id for entry in theirs]
            for entry, other in zip(mine, theirs, strict=True):
                assert entry.logprob == pytest.approx(other.logprob, abs=TOLERANCE)


def assert_all_others_had_their_tokens(told: Told, culprit: str) -> None:
    """In the very step in which the culprit failed."""
    (lost,) = [(step, result) for step, result in told.steps if culprit in result.failed]
    assert set(lost[1].sampled) == {item.request_id for item in lost[0].scheduled} - {culprit}
    assert len(lost[1].sampled) == 7


CULPRITS = {
    "in its prompt": make("culprit", [1, 100, POISON, 101]),
    "in its answer": make("culprit", range(700, 712), logit_bias={POISON: 100.0}),
}


@pytest.mark.parametrize("where", CULPRITS)
def test_a_request_whose_computation_raises_fails_alone(
    core: EngineCore, control: Told, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(ids: list[int]) -> None:
        if POISON in ids:
            raise ValueError("injected")

    sizes = at_each_run(core, fault)
    told = Told(core).serve(with_culprit(CULPRITS[where]))
    assert told.errors == {"culprit": CRASHED}
    assert len(told.tokens["culprit"]) == (where == "in its answer")
    assert_nobody_else_noticed(told, control)
    assert_all_others_had_their_tokens(told, "culprit")
    assert told.preemptions == 0
    assert len(sizes) - len(told.steps) <= 2 * 3
    assert "runs for 8 at once: failed alone: request culprit; out of memory: none" in caplog.text
    assert "injected" in caplog.text


@pytest.mark.parametrize("pair", [("short", "pictured"), ("sampled", "narrow"), ("told", "grammar")])
def test_two_who_fail_only_together_both_succeed(core: EngineCore, control: Told, pair: tuple[str, str]) -> None:
    def fault(request_ids: list[str]) -> None:
        if set(pair) <= set(request_ids):
            raise ValueError("injected")

    FaultySampler(core, fault)
    told = Told(core).serve(others())
    assert told.errors == {}
    assert_nobody_else_noticed(told, control)
    assert len(told.steps) == len(control.steps)


def test_a_sampler_that_raises_for_one_row_fails_that_row(core: EngineCore, control: Told) -> None:
    def fault(request_ids: list[str]) -> None:
        if "culprit" in request_ids:
            raise IndexError("injected")

    FaultySampler(core, fault)
    told = Told(core).serve(with_culprit(make("culprit", range(700, 712), temperature=1.0, seed=1)))
    assert told.errors == {"culprit": CRASHED}
    assert_nobody_else_noticed(told, control)
    assert_all_others_had_their_tokens(told, "culprit")


class PanicException(BaseException):
    """As a panic of a native library comes: no Exception."""


@pytest.mark.parametrize("error", [RuntimeError("injected"), PanicException("injected")], ids=["error", "panic"])
@pytest.mark.parametrize("verb", ["bitmask", "advance"])
def test_a_grammar_that_breaks_fails_its_request(
    core: EngineCore, control: Told, monkeypatch: pytest.MonkeyPatch, verb: str, error: BaseException
) -> None:
    real = getattr(Matcher, verb)

    def faulty(matcher: Matcher, *args: int) -> object:
        if matcher._param == "culprit":
            raise error
        return real(matcher, *args)

    monkeypatch.setattr(Matcher, verb, faulty)
    sizes = at_each_run(core, lambda ids: None)
    culprit = make("culprit", range(700, 712), grammar=GrammarSpec("regex", "[0-9]{12}", "culprit"))
    told = Told(core).serve(with_culprit(culprit))
    assert told.errors == {"culprit": LOST}
    assert_nobody_else_noticed(told, control)
    assert_all_others_had_their_tokens(told, "culprit")
    assert len(sizes) == len(told.steps), "nothing is to be computed again where it is known whose fault it is"


def test_a_panic_while_a_grammar_is_compiled_ends_its_request(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(*_args: object, **_kwargs: object) -> None:
        raise PanicException("injected")

    monkeypatch.setattr(GrammarCompiler, "compile", panic)
    told = Told(core).serve([make("culprit", [1, 5], grammar=LETTERS), make("fine", [1, 6])])
    assert set(told.errors) == {"culprit"}
    assert len(told.tokens["fine"]) == 6


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", [0, 1, 3], ids=["prompts", "first decode", "later decode"])
def test_a_lack_of_memory_that_passes_is_noticed_by_nobody(core: EngineCore, control: Told, when: int) -> None:
    runs = iter(range(100))
    at_each_run(core, lambda ids: run_out_of_memory() if next(runs) == when else None)
    told = Told(core).serve(others())
    assert told.errors == {}
    assert told.preemptions == 0
    assert_nobody_else_noticed(told, control)


def test_with_memory_for_two_at_a_time_all_are_answered(core: EngineCore, control: Told) -> None:
    FaultySampler(core, lambda request_ids: run_out_of_memory() if len(request_ids) > 2 else None)
    told = Told(core).serve(others())
    assert told.errors == {}
    assert_nobody_else_noticed(told, control)
    assert len(told.steps) == len(control.steps)


@pytest.mark.parametrize("where", CULPRITS)
def test_who_never_has_memory_is_told_so_after_three_tries(core: EngineCore, control: Told, where: str) -> None:
    at_each_run(core, lambda ids: run_out_of_memory() if POISON in ids else None)
    told = Told(core).serve(with_culprit(CULPRITS[where]))
    assert set(told.errors) == {"culprit"}
    assert told.ends["culprit"].error_code == "out_of_memory"
    assert sum("culprit" in result.deferred for _, result in told.steps) == 3
    assert told.preemptions == 2
    assert_nobody_else_noticed(told, control)


@pytest.mark.parametrize("where", CULPRITS)
def test_who_has_memory_at_the_third_try_is_answered_as_if_nothing_had_been(
    tiny_checkpoint: Path, core: EngineCore, control: Told, where: str
) -> None:
    told = Told(core)

    def fault(ids: list[int]) -> None:
        if POISON in ids and sum("culprit" in result.deferred for _, result in told.steps) < 2:
            run_out_of_memory()

    at_each_run(core, fault)
    told.serve(with_culprit(CULPRITS[where]))
    assert (told.errors, told.preemptions) == ({}, 2)
    alone = Told(make_core(tiny_checkpoint)).serve([CULPRITS[where]])
    assert told.tokens["culprit"] == alone.tokens["culprit"]
    assert_nobody_else_noticed(told, control)


def test_a_picture_that_has_no_memory_once_is_encoded_in_the_same_step(core: EngineCore, control: Told) -> None:
    shortages = iter([True, False])
    at_each_encoding(core, lambda pixels: run_out_of_memory() if next(shortages) else None)
    told = Told(core).serve(others())
    assert (told.errors, told.preemptions) == ({}, 0)
    assert_nobody_else_noticed(told, control)


def test_a_picture_that_never_has_memory_ends_its_request_and_is_not_found_later(
    tiny_checkpoint: Path, core: EngineCore, control: Told
) -> None:
    is_short = True

    def fault(pixels: torch.Tensor) -> None:
        if is_short and pixels.shape[-1] == 70:
            run_out_of_memory()

    at_each_encoding(core, fault)
    culprit = make_pictured("culprit", size=(42, 70), seed=2)
    told = Told(core).serve(with_culprit(culprit))
    assert {name: end.error_code for name, end in told.ends.items() if end.error} == {"culprit": "out_of_memory"}
    assert sum(len(result.failed_slots) for _, result in told.steps) == 3
    assert_nobody_else_noticed(told, control)
    is_short = False
    told.serve([culprit])
    fresh = Told(make_core(tiny_checkpoint)).serve([culprit])
    assert told.tokens["culprit"] == fresh.tokens["culprit"]


def test_a_hundred_shortages_in_a_row_leave_nothing_behind(core: EngineCore, control: Told) -> None:
    left = 100

    def fault(_: object) -> None:
        nonlocal left
        if left:
            left -= 1
            run_out_of_memory()

    at_each_run(core, fault)
    at_each_encoding(core, fault)
    told = Told(core)
    rounds = 0
    while left:
        told.serve(others())
        rounds += 1
    assert rounds > 1
    assert {end.error_code for end in told.ends.values() if end.error} <= {"out_of_memory"}
    after = Told(core).serve(others())
    assert after.errors == {}
    assert_nobody_else_noticed(after, control)
