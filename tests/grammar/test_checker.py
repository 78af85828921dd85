from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from server.errors import ClientError, UnavailableError
from server.grammar import checker as checker_module
from server.grammar.check_worker import CHECK_SECONDS
from server.grammar.checker import GrammarChecker
from server.grammar.vocabulary import VocabularySpec
from server.types import GrammarSpec
from tests.grammar.walks import Model, schema_spec


@pytest.fixture(scope="module")
def shared(model: Model) -> Iterator[GrammarChecker]:
    checker = GrammarChecker(model.vocabulary)
    yield checker
    checker.close()


def refusal(checker: GrammarChecker, spec: GrammarSpec) -> str:
    with pytest.raises(ClientError) as caught:
        checker.check(spec)
    assert caught.value.param == spec.param
    assert caught.value.code == "invalid_value"
    return caught.value.message


def pid(checker: GrammarChecker) -> int:
    assert checker._child is not None
    return checker._child.pid


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
def test_what_is_fine_passes(shared: GrammarChecker, spec: GrammarSpec) -> None:
    shared.check(spec)


def test_refusals_come_with_their_reason(shared: GrammarChecker) -> None:
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
def test_hostile_sources_cost_a_process_and_little_time(shared: GrammarChecker, name: str) -> None:
    shared.start()
    before = _cpu_seconds()
    assert "it is too large or too complex" in refusal(shared, HOSTILE[name])
    assert _cpu_seconds() - before < CHECK_SECONDS + 1.0  # with the child's start


def _cpu_seconds() -> float:
    """Of this process and of the children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def test_verdicts_are_remembered(model: Model) -> None:
    checker = GrammarChecker(model.vocabulary)
    checker.start()
    crash = reference_chain(1450)
    message = refusal(checker, crash)
    fine = schema_spec({"type": "null"})
    checker.check(fine)
    child = pid(checker)
    os.kill(child, signal.SIGSTOP)  # it cannot answer any more
    checker.check(fine)
    assert refusal(checker, crash) == message
    assert pid(checker) == child
    checker.close()


def test_a_dead_child_is_replaced(shared: GrammarChecker) -> None:
    shared.start()
    before = pid(shared)
    os.kill(before, signal.SIGKILL)
    assert shared._child is not None
    shared._child.wait()
    shared.check(GrammarSpec("regex", "after a death"))
    assert pid(shared) != before


def test_a_signal_to_the_group_is_the_parents(shared: GrammarChecker) -> None:
    shared.start()
    before = pid(shared)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(before, number)
    shared.check(GrammarSpec("regex", "after signals"))
    assert pid(shared) == before


def test_a_child_that_gets_no_time_is_nobodys_fault(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    checker = GrammarChecker(model.vocabulary)
    checker.start()
    child = pid(checker)
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
    checker.close()


def test_threads_share_the_child(shared: GrammarChecker) -> None:
    results: dict[int, str] = {}

    def work(index: int) -> None:
        try:
            shared.check(schema_spec({"const": index} if index % 2 else {"not": {"const": index}}))
            results[index] = "fine"
        except ClientError as error:
            results[index] = error.message

    threads = [threading.Thread(target=work, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((results[index] == "fine") == bool(index % 2) for index in range(16))


def test_closing_ends_the_child_and_all_checks(model: Model) -> None:
    checker = GrammarChecker(model.vocabulary)
    checker.start()
    child = pid(checker)
    checker.close()
    checker.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    with pytest.raises(UnavailableError):
        checker.check(GrammarSpec("regex", "a"))


def test_a_child_that_cannot_start_is_the_servers_fault() -> None:
    unusable = VocabularySpec(token_bytes=[], special_token_ids=frozenset(), eos_token_ids=(), vocab_size=0)
    checker = GrammarChecker(unusable)
    with pytest.raises(UnavailableError):
        checker.check(GrammarSpec("regex", "a"))
    assert checker._child is None


def test_the_child_sees_no_secrets(shared: GrammarChecker, monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
    monkeypatch.setenv("IDEFICS2_TEST_SECRET", "hunter2")
    checker = GrammarChecker(model.vocabulary)
    checker.start()
    with open(f"/proc/{pid(checker)}/environ", "rb") as environment:
        assert b"hunter2" not in environment.read()
    checker.close()


def test_the_childs_memory_is_bounded(shared: GrammarChecker) -> None:
    shared.start()
    with open(f"/proc/{pid(shared)}/limits", encoding="ascii") as limits:
        limit = next(line for line in limits if line.startswith("Max address space")).split()[3]
    with open(f"/proc/{pid(shared)}/statm", encoding="ascii") as statm:
        used = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    assert 0 < int(limit) - used <= 1 << 30


def test_a_source_may_be_fine_as_one_kind_alone(shared: GrammarChecker) -> None:
    shared.check(GrammarSpec("regex", "[abc]"))
    assert "not valid JSON" in refusal(shared, GrammarSpec("choice", "[abc]"))


def test_the_slowest_step_counts(shared: GrammarChecker) -> None:
    """A grammar that compiles in milliseconds, and would then hold up each step of everybody's."""
    ambiguous = GrammarSpec("grammar", 'start: s\ns: s s | s s s | "a" | ""')
    assert "it is too large or too complex" in refusal(shared, ambiguous)
    assert shared._child is not None
    assert shared._child.poll() is None


def test_json_of_a_spec_travels_whole(shared: GrammarChecker) -> None:
    source = json.dumps({"enum": ["é" * 20_000, "🙂" * 100]}, ensure_ascii=False)
    shared.check(GrammarSpec("json_schema", source))
