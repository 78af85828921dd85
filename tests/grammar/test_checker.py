from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from server.errors import ClientError, UnavailableError
from server.grammar import checker as checker_module
from server.grammar.check_worker import CHECK_SECONDS
from server.grammar.checker import GrammarChecker
from server.grammar.vocabulary import VocabularySpec
from server.types import GrammarSpec
from tests.grammar.walks import Model, schema_spec


class Blocking:
    """A checker and an event loop for it, for tests that ask one thing after the other."""

    def __init__(self, vocabulary: VocabularySpec, *, num_children: int = 1) -> None:
        self._runner = asyncio.Runner()
        self.checker = GrammarChecker(vocabulary, num_children=num_children)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(asyncio.wait_for(work, 60))

    def start(self) -> None:
        self.run(self.checker.start())

    def check(self, spec: GrammarSpec) -> None:
        self.run(self.checker.check(spec))

    def wait_until_replaced(self) -> None:
        """A broken child is replaced in the background."""
        self.run(asyncio.wait_for(self._replaced(), 30))

    async def _replaced(self) -> None:
        while not all(child.is_running for child in self.checker._children) or self.checker._tasks:
            await asyncio.sleep(0.01)

    @property
    def pids(self) -> list[int]:
        found = [child.pid for child in self.checker._children if child.pid is not None]
        assert len(found) == len(self.checker._children)
        return found

    @property
    def pid(self) -> int:
        (only,) = self.pids
        return only

    def close(self) -> None:
        self.run(self.checker.close())

    def end(self) -> None:
        self.close()
        self._runner.close()


@contextmanager
def checking(vocabulary: VocabularySpec, *, num_children: int = 1) -> Iterator[Blocking]:
    checker = Blocking(vocabulary, num_children=num_children)
    try:
        yield checker
    finally:
        checker.end()


@pytest.fixture(scope="module")
def shared(model: Model) -> Iterator[Blocking]:
    with checking(model.vocabulary) as checker:
        yield checker


def refusal(checker: Blocking, spec: GrammarSpec) -> str:
    with pytest.raises(ClientError) as caught:
        checker.check(spec)
    assert caught.value.param == spec.param
    assert caught.value.code == "invalid_value"
    return caught.value.message


@pytest.mark.parametrize(
    "spec",
    [
        schema_spec({"type": "object"}),
        schema_spec({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}}),
        schema_spec({"type": "array", "items": {"type": "null"}, "minItems": 10**9, "maxItems": 10**9}),
        GrammarSpec("regex", "[a-z]+é"),
        GrammarSpec("regex", "(a{1000}){1000}"),
        GrammarSpec("regex", "(a+)+$"),
        GrammarSpec("choice", '["a", "漢"]'),
        GrammarSpec("grammar", 'start: "a" start | "b"'),
    ],
)
def test_what_is_fine_passes(shared: Blocking, spec: GrammarSpec) -> None:
    shared.check(spec)


def test_refusals_come_with_their_reason(shared: Blocking) -> None:
    spec = schema_spec({"not": {}})
    assert refusal(shared, spec) == "the JSON schema is not supported: the keyword not is not supported"
    other = GrammarSpec("json_schema", spec.source, "other.param")
    assert refusal(shared, other) == refusal(shared, spec)
    assert "at most 65536" in refusal(shared, GrammarSpec("regex", "x" * 70_000))
    assert "surrogate" in refusal(shared, GrammarSpec("regex", "\ud800"))
    assert "leads nowhere" in refusal(shared, GrammarSpec("grammar", 'start: "a" b\nb: c\nc: b'))


def reference_chain(length: int) -> GrammarSpec:
    links = {str(index): {"properties": {"a": {"$ref": f"#/{index + 1}"}}} for index in range(length)}
    return schema_spec({"$ref": "#/0", **links, str(length): True})


def patterns(count: int) -> GrammarSpec:
    return schema_spec({"allOf": [{"type": "string", "pattern": f"a.{{{index}}}b"} for index in range(count)]})


def optional_properties(count: int) -> GrammarSpec:
    names = {str(index): {} for index in range(count)}
    return schema_spec({"minProperties": 1, "additionalProperties": False, "properties": names})


def symbols(line: str, count: int) -> GrammarSpec:
    chain = "".join(line.format(index, index + 1) for index in range(count))
    return GrammarSpec("grammar", f"{chain}{line[0]}{count}: /y/\nstart: {line[0]}0")


HOSTILE = {
    "a chain of references that overflows the stack": reference_chain(1450),
    "a chain of rules that overflows the stack": symbols('a{}: a{} "x"\n', 3500),
    "a chain of terminals that overflows the stack": symbols('A{}: "x" A{}?\n', 3500),
    "patterns that are compiled for minutes": patterns(200),
    "optional properties that are compiled for minutes": optional_properties(3000),
    "alternatives that multiply": GrammarSpec("regex", "a?" * 10_000 + "a" * 10_000),
    "a grammar that doubles": symbols("A{0}: A{1} A{1}\n", 40),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_sources_cost_a_process_and_little_time(shared: Blocking, name: str) -> None:
    shared.start()
    before = _cpu_seconds()
    assert "it is too large or too complex" in refusal(shared, HOSTILE[name])
    assert _cpu_seconds() - before < CHECK_SECONDS + 1.0  # with the next child's start
    shared.wait_until_replaced()


def _cpu_seconds() -> float:
    """Of this process and of the children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def test_verdicts_are_remembered(model: Model) -> None:
    with checking(model.vocabulary) as checker:
        crash = reference_chain(1450)
        message = refusal(checker, crash)
        checker.wait_until_replaced()
        fine = schema_spec({"type": "null"})
        checker.check(fine)
        child = checker.pid
        os.kill(child, signal.SIGSTOP)  # it cannot answer any more
        checker.check(fine)
        assert refusal(checker, crash) == message
        assert checker.pid == child


def test_a_child_that_died_is_replaced(shared: Blocking) -> None:
    shared.start()
    before = shared.pid
    os.kill(before, signal.SIGKILL)
    shared.run(_until(lambda: not shared.checker._children[0].is_running))
    shared.check(GrammarSpec("regex", "after a death"))
    assert shared.pid != before


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_signal_to_the_group_is_the_parents(shared: Blocking) -> None:
    shared.start()
    before = shared.pid
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(before, number)
    shared.check(GrammarSpec("regex", "after signals"))
    assert shared.pid == before


def test_a_child_that_gets_no_time_is_nobodys_fault(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with checking(model.vocabulary) as checker:
        checker.start()
        child = checker.pid
        os.kill(child, signal.SIGSTOP)
        spec = GrammarSpec("regex", "never seen")
        with monkeypatch.context() as patch:
            patch.setattr(checker_module, "_ANSWER_SECONDS", 0.2)
            with pytest.raises(UnavailableError) as caught:
                checker.check(spec)
        assert caught.value.code == "grammar_checker_unavailable"
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)
        checker.check(spec)


async def outcome(checker: GrammarChecker, spec: GrammarSpec, key: str = "") -> str:
    try:
        await checker.check(spec, key=key)
    except ClientError:
        return "refused"
    except UnavailableError as error:
        return error.message
    return "fine"


def test_many_at_once_each_get_their_own_verdict(model: Model) -> None:
    async def ask(checker: GrammarChecker) -> list[str]:
        specs = (schema_spec({"const": i // 2} if i % 2 else {"not": {"const": i // 2}}) for i in range(32))
        return await asyncio.gather(*(outcome(checker, spec) for spec in specs))

    with checking(model.vocabulary, num_children=2) as checker:
        assert checker.run(ask(checker.checker)) == ["refused", "fine"] * 16


def test_whoever_sends_what_takes_long_delays_only_themselves(model: Model) -> None:
    """With as many slow grammars as there are children, all of one client."""

    async def ask(checker: GrammarChecker) -> list[str]:
        order: list[str] = []

        async def note(name: str, spec: GrammarSpec, key: str) -> None:
            await outcome(checker, spec, key)
            order.append(name)

        slow = [note(f"slow {i}", GrammarSpec("regex", "a?" * (10_000 + i) + "a" * 10_000), "one") for i in range(2)]
        quick = [note("quick", GrammarSpec("regex", f"[a-z]{{{i + 1}}}"), "two") for i in range(4)]
        await asyncio.gather(*slow, *quick)
        return order

    with checking(model.vocabulary, num_children=2) as checker:
        checker.start()
        order = checker.run(ask(checker.checker))
        assert order[:4] == ["quick"] * 4
        assert sorted(order[4:]) == ["slow 0", "slow 1"]
        checker.wait_until_replaced()


def test_a_client_that_leaves_costs_nobody_a_child_or_an_answer(model: Model) -> None:
    """Whether it leaves while its grammar is tried, or in the line: the next one gets its own verdict."""

    async def ask(checker: GrammarChecker) -> list[str]:
        refused = [GrammarSpec("regex", f"(?=b){{{i + 1}}}") for i in range(8)]
        leaving = [asyncio.create_task(outcome(checker, spec)) for spec in refused]
        for _ in range(1000):
            await asyncio.sleep(0)
            if len(checker._tasks) == 2:
                break
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        return await asyncio.gather(*(outcome(checker, GrammarSpec("regex", f"b{{{i + 1}}}")) for i in range(8)))

    with checking(model.vocabulary, num_children=2) as checker:
        checker.start()
        before = checker.pids
        assert checker.run(ask(checker.checker)) == ["fine"] * 8
        assert checker.pids == before


def test_closing_ends_the_children_and_all_checks(model: Model) -> None:
    async def ask(checker: GrammarChecker) -> list[str]:
        asking = [
            asyncio.create_task(outcome(checker, GrammarSpec("regex", "a?" * (10_000 + i) + "a" * 10_000)))
            for i in range(4)
        ]
        await asyncio.sleep(0.1)  # two are under way, two wait
        await checker.close()
        return await asyncio.gather(*asking)

    with checking(model.vocabulary, num_children=2) as checker:
        checker.start()
        children = checker.pids
        assert checker.run(ask(checker.checker)) == ["the server is shutting down"] * 4
        checker.close()
        for child in children:
            with pytest.raises(ProcessLookupError):
                os.kill(child, 0)
        with pytest.raises(UnavailableError):
            checker.check(GrammarSpec("regex", "a"))


def test_a_child_that_cannot_start_is_the_servers_fault() -> None:
    unusable = VocabularySpec(token_bytes=[], special_token_ids=frozenset(), eos_token_ids=(), vocab_size=0)
    with checking(unusable) as checker:
        for _ in range(2):
            with pytest.raises(UnavailableError):
                checker.check(GrammarSpec("regex", "a"))
            checker.run(_until(lambda: not checker.checker._tasks))
        assert not checker.checker._children[0].is_running


def test_the_child_sees_no_secrets(monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    monkeypatch.setenv("IDEFICS2_TEST_SECRET", "hunter2")
    with checking(model.vocabulary) as checker:
        checker.start()
        with open(f"/proc/{checker.pid}/environ", "rb") as environment:
            assert b"hunter2" not in environment.read()


def test_the_childs_memory_is_bounded(shared: Blocking) -> None:
    shared.start()
    with open(f"/proc/{shared.pid}/limits", encoding="ascii") as limits:
        limit = next(line for line in limits if line.startswith("Max address space")).split()[3]
    with open(f"/proc/{shared.pid}/statm", encoding="ascii") as statm:
        used = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    assert 0 < int(limit) - used <= 1 << 30


def test_a_source_may_be_fine_as_one_kind_alone(shared: Blocking) -> None:
    shared.check(GrammarSpec("regex", "[abc]"))
    assert "not valid JSON" in refusal(shared, GrammarSpec("choice", "[abc]"))


def test_the_slowest_step_counts(shared: Blocking) -> None:
    """A grammar that compiles in milliseconds, and would then hold up each step of everybody's."""
    shared.start()
    before = shared.pid
    ambiguous = GrammarSpec("grammar", 'start: s\ns: s s | s s s | "a" | ""')
    assert "it is too large or too complex" in refusal(shared, ambiguous)
    assert shared.pid == before


def test_json_of_a_spec_travels_whole(shared: Blocking) -> None:
    source = json.dumps({"enum": ["é" * 20_000, "🙂" * 100]}, ensure_ascii=False)
    shared.check(GrammarSpec("json_schema", source))
