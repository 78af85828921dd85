from __future__ import annotations

import threading

import pytest

from server.errors import ClientError
from server.grammar import compiler as compiler_module
from server.grammar.compiler import GrammarCompiler
from server.types import GrammarSpec
from tests.grammar.walks import Model, allowed, schema_spec, start


@pytest.fixture
def counted(model: Model, monkeypatch: pytest.MonkeyPatch) -> tuple[GrammarCompiler, list[GrammarSpec]]:
    """A compiler of its own, and what it has really compiled."""
    compiler = GrammarCompiler(model.vocabulary)
    compiled: list[GrammarSpec] = []
    parse = compiler._parse

    def counting(spec: GrammarSpec) -> object:
        compiled.append(spec)
        return parse(spec)

    monkeypatch.setattr(compiler, "_parse", counting)
    return compiler, compiled


def test_the_same_source_is_compiled_once(counted: tuple[GrammarCompiler, list[GrammarSpec]], model: Model) -> None:
    compiler, compiled = counted
    matcher = start(compiler, schema_spec({"type": "integer"}))
    matcher.advance(model.ids[b"1"])
    again = compiler.compile(GrammarSpec("json_schema", '{"type":"integer"}', "other"), leading_space=False)
    assert len(compiled) == 1
    assert model.eos_token_ids[0] not in allowed(again, model)  # at its own start


def test_kinds_do_not_share_sources(counted: tuple[GrammarCompiler, list[GrammarSpec]], model: Model) -> None:
    compiler, compiled = counted
    source = '["a"]'
    assert model.ids[b"a"] in allowed(start(compiler, GrammarSpec("choice", source)), model)
    assert model.ids[b'"'] in allowed(start(compiler, GrammarSpec("regex", source)), model)
    assert [spec.kind for spec in compiled] == ["choice", "regex"]


def test_the_least_recently_used_is_forgotten(
    counted: tuple[GrammarCompiler, list[GrammarSpec]], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, compiled = counted
    monkeypatch.setattr(compiler_module, "CACHED_GRAMMARS", 2)
    a, b, c = (GrammarSpec("regex", letter) for letter in "abc")
    for spec in (a, b, a, c, a, b):
        start(compiler, spec)
    assert [spec.source for spec in compiled] == ["a", "b", "c", "b"]


def test_a_failure_is_not_remembered_as_a_grammar(counted: tuple[GrammarCompiler, list[GrammarSpec]]) -> None:
    compiler, compiled = counted
    for param in ("first", "second"):
        with pytest.raises(ClientError) as caught:
            compiler.compile(GrammarSpec("regex", "(", param), leading_space=True)
        assert caught.value.param == param
    assert len(compiled) == 2


def test_threads_may_compile_and_match_at_once(compiler: GrammarCompiler, model: Model) -> None:
    specs = [schema_spec({"type": "object", "properties": {f"p{i % 5}": {"maxLength": i % 5}}}) for i in range(40)]
    expected = [start(compiler, spec).bitmask().tolist() for spec in specs]
    failures: list[BaseException] = []

    def work(offset: int) -> None:
        try:
            for index in range(len(specs)):
                index = (index + offset) % len(specs)
                matcher = start(compiler, specs[index])
                assert matcher.bitmask().tolist() == expected[index]
                for token_id in model.spell('{"p1": "x'[: index % 9]):
                    if token_id in allowed(matcher, model):
                        matcher.advance(token_id)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(7 * index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_specs_own_path_is_in_its_errors(compiler: GrammarCompiler) -> None:
    with pytest.raises(ClientError) as caught:
        compiler.compile(GrammarSpec("json_schema", "{", "tools[0].function.parameters"), leading_space=True)
    assert caught.value.param == "tools[0].function.parameters"
    assert caught.value.message == "the JSON schema is not valid JSON"
