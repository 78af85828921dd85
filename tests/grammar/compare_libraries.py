"""Run llguidance and xgrammar over the same JSON schemas, and print what each of them makes of them.

    python tests/grammar/compare_libraries.py --suite DIR --bench DIR --sample 2500 --seed 0

`--suite` is a checkout of the JSON-Schema-Test-Suite, `--bench` one of jsonschemabench (its `maskbench/data`). Both
libraries must be installed. Not a test: pytest does not collect it. Each library runs in a process of its own on one
thread; a schema that takes longer than `--timeout` or kills the process counts as that, and a fresh process goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SUITE_DRAFTS = ("draft2020-12", "draft7")
# "format" may be asserted or not, as one likes, and this file holds to one of both readings.
SUITE_LEFT_OUT = {"format.json"}
MAX_INSTANCE_CHARACTERS = 20_000
SERIALISATIONS = ((",", ":"), (", ", ": "))  # as `separators` of json.dumps


@dataclass(frozen=True)
class Case:
    """A schema with instances of which it is known whether they are valid."""

    source: str
    schema: Any
    instances: Sequence[tuple[Any, bool]]


def load_suite(folder: Path) -> Iterable[Case]:
    for draft in SUITE_DRAFTS:
        for file in sorted((folder / "tests" / draft).glob("*.json")):
            if file.name in SUITE_LEFT_OUT:
                continue
            for group in json.loads(file.read_text(encoding="utf-8")):
                instances = [(test["data"], test["valid"]) for test in group["tests"]]
                yield Case("suite", group["schema"], instances)


def load_bench(folder: Path, sample: int, seed: int) -> Iterable[Case]:
    files = sorted((folder / "maskbench" / "data").glob("*.json"))
    for file in random.Random(seed).sample(files, min(sample, len(files))):
        content = json.loads(file.read_text(encoding="utf-8"))
        yield Case("bench", content["schema"], [(test["data"], test["valid"]) for test in content["tests"]])


class Constraint(Protocol):
    """One answer under way."""

    def mask_allows(self, token_id: int) -> tuple[bool, float]:
        """Whether a token may come next, and the seconds that the whole mask took."""

    def advance(self, token_id: int) -> None: ...


class Library(Protocol):
    def compile(self, schema: str) -> Callable[[], Constraint]:
        """A maker of constraints. Raises ValueError when the library refuses the schema."""


class Llguidance:
    def __init__(self, tokens: Sequence[bytes], special: Sequence[int], eos: Sequence[int]) -> None:
        import llguidance

        class Vocabulary:
            eos_token_id, bos_token_id, special_token_ids = eos[0], None, ()
            is_tokenizer_wrapper = True

            def __init__(self) -> None:
                self.tokens = [b"" if index in set(special) else data for index, data in enumerate(tokens)]

            def __call__(self, text: str) -> list[int]:
                raise AssertionError("nothing is tokenized where nothing is forced")

        self._module = llguidance
        self._tokenizer = llguidance.LLTokenizer(Vocabulary(), eos_token=list(eos))

    def compile(self, schema: str) -> Callable[[], Constraint]:
        # any tokens that spell the text, as xgrammar has it, rather than those that a tokenizer would have made of it
        driver = {"lark_grammar": '%llguidance {"no_forcing": true}\nstart: @schema'}
        grammar = json.dumps({"grammars": [driver, {"name": "schema", "json_schema": json.loads(schema)}]})
        prototype = self._module.LLMatcher(self._tokenizer, grammar, log_level=0)
        if prototype.is_error():
            raise ValueError(prototype.get_error().splitlines()[0])
        return lambda: _LlguidanceConstraint(prototype.deep_copy(), self._tokenizer.vocab_size)


class _LlguidanceConstraint:
    def __init__(self, matcher: Any, vocab_size: int) -> None:
        import numpy as np

        self._matcher = matcher
        self._words = np.zeros(-(-vocab_size // 32), dtype=np.int32)

    def mask_allows(self, token_id: int) -> tuple[bool, float]:
        start = time.perf_counter()
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        seconds = time.perf_counter() - start
        if self._matcher.is_error():
            raise RuntimeError("limit")
        return bool(int(self._words[token_id // 32]) >> (token_id % 32) & 1), seconds

    def advance(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            raise RuntimeError("the mask allowed a token that is refused")


class Xgrammar:
    def __init__(self, tokens: Sequence[bytes], special: Sequence[int], eos: Sequence[int]) -> None:
        import xgrammar

        shown = [b"" if index in set(special) else data for index, data in enumerate(tokens)]
        info = xgrammar.TokenizerInfo(shown, xgrammar.VocabType.RAW, vocab_size=len(tokens), stop_token_ids=list(eos))
        self._module = xgrammar
        self._vocab_size = len(tokens)
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, schema: str) -> Callable[[], Constraint]:
        try:
            # strict_mode would close every object, which JSON Schema does not ask for
            compiled = self._compiler.compile_json_schema(schema, any_whitespace=True, strict_mode=False)
        except Exception as error:
            raise ValueError(str(error).splitlines()[-1]) from error
        return lambda: _XgrammarConstraint(self._module, compiled, self._vocab_size)


class _XgrammarConstraint:
    def __init__(self, module: Any, compiled: Any, vocab_size: int) -> None:
        self._matcher = module.GrammarMatcher(compiled)
        self._bitmask = module.allocate_token_bitmask(1, vocab_size)
        self._words = self._bitmask.numpy()[0]

    def mask_allows(self, token_id: int) -> tuple[bool, float]:
        start = time.perf_counter()
        needed = self._matcher.fill_next_token_bitmask(self._bitmask)
        seconds = time.perf_counter() - start
        return not needed or bool(int(self._words[token_id // 32]) >> (token_id % 32) & 1), seconds

    def advance(self, token_id: int) -> None:
        if not self._matcher.accept_token(token_id):
            raise RuntimeError("the mask allowed a token that is refused")


LIBRARIES: dict[str, Callable[..., Library]] = {"llguidance": Llguidance, "xgrammar": Xgrammar}


class Encoder:
    """The demo model's tokenizer: ids whose bytes are exactly those of a text, without the usual leading space."""

    def __init__(self) -> None:
        from server.demo.checkpoint import END_OF_UTTERANCE_ID, EOS_ID, ensure_demo
        from server.inputs.tokenizer import Tokenizer
        from server.outputs.detokenizer import TokenTable

        self._tokenizer = Tokenizer(ensure_demo())
        self.special = sorted(self._tokenizer.special_tokens.values())
        self.eos = (EOS_ID, END_OF_UTTERANCE_ID)
        self.tokens = TokenTable.from_pieces(self._tokenizer.pieces(), self.special).token_bytes
        self._single = {data: index for index, data in enumerate(self.tokens) if len(data) == 1}

    def encode(self, text: str) -> list[int]:
        first, *rest = self._tokenizer.encode(text, first=True)
        visible = self.tokens[first].removeprefix(b" ")
        token_ids = [self._single[bytes([byte])] for byte in visible] + rest
        assert b"".join(self.tokens[token_id] for token_id in token_ids) == text.encode()
        return token_ids


def work(name: str) -> None:
    """Answer each line of standard input, a case as JSON, with a line of figures. Runs in a process of its own."""
    encoder = Encoder()
    library = LIBRARIES[name](encoder.tokens, encoder.special, encoder.eos)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(library, encoder, json.loads(line))), file=answers, flush=True)


def measure(library: Library, encoder: Encoder, case: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        make = library.compile(json.dumps(case["schema"]))
        make()
    except ValueError as error:
        return {"refused": str(error)[:200], "compile": time.perf_counter() - start}
    compile_seconds = time.perf_counter() - start
    verdicts, masks = [], []
    for data, valid in case["instances"]:
        for separators in SERIALISATIONS:
            text = json.dumps(data, ensure_ascii=False, separators=separators)
            if len(text) > MAX_INSTANCE_CHARACTERS:
                continue
            try:
                accepted = accepts(make(), [*encoder.encode(text), encoder.eos[0]], masks)
            except (RuntimeError, UnicodeEncodeError) as error:  # half a surrogate pair cannot be encoded
                verdicts.append([valid, None, str(error)])
            else:
                verdicts.append([valid, accepted, ""])
    return {"compile": compile_seconds, "verdicts": verdicts, "masks": masks}


def accepts(constraint: Constraint, token_ids: Sequence[int], masks: list[float]) -> bool:
    for token_id in token_ids:
        allowed, seconds = constraint.mask_allows(token_id)
        masks.append(seconds)
        if not allowed:
            return False
        if token_id != token_ids[-1]:
            constraint.advance(token_id)
    return True


@dataclass
class Figures:
    accepted: int = 0
    refused: int = 0
    timeouts: int = 0
    crashes: int = 0
    failures: int = 0
    valid: int = 0
    valid_rejected: int = 0
    invalid: int = 0
    invalid_accepted: int = 0
    spoiled: int = 0
    compiles: list[float] = field(default_factory=list)
    masks: list[float] = field(default_factory=list)

    def add(self, answer: dict[str, Any]) -> None:
        self.compiles.append(answer["compile"])
        if "refused" in answer:
            self.refused += 1
            return
        self.accepted += 1
        self.masks += answer["masks"]
        wrong = False
        for valid, accepted, _ in answer["verdicts"]:
            self.failures += accepted is None
            self.valid += valid
            self.invalid += not valid
            self.valid_rejected += valid and accepted is False
            self.invalid_accepted += not valid and accepted is True
            wrong |= not valid and accepted is True
        self.spoiled += wrong

    def rows(self) -> dict[str, str]:
        return {
            "schemas accepted": str(self.accepted),
            "schemas refused when compiled": str(self.refused),
            "timeouts": str(self.timeouts),
            "crashes of the process": str(self.crashes),
            "valid instances wrongly rejected": f"{self.valid_rejected} of {self.valid}",
            "invalid instances wrongly accepted": f"{self.invalid_accepted} of {self.invalid}",
            "schemas with an invalid instance accepted": str(self.spoiled),
            "limits hit or desynchronised midway": str(self.failures),
            "compile ms: median / p99 / max": _spread(self.compiles, 1e3),
            "mask µs: median / p99 / max": _spread(self.masks, 1e6),
            "masks computed": str(len(self.masks)),
        }


def _spread(values: Sequence[float], scale: float) -> str:
    if len(values) < 2:
        return "-"
    p99 = statistics.quantiles(values, n=100, method="inclusive")[98]
    return " / ".join(f"{value * scale:,.2f}" for value in (statistics.median(values), p99, max(values)))


class Worker:
    """A child process that measures; started again after it hangs or dies."""

    def __init__(self, name: str, timeout: float) -> None:
        self._name, self._timeout = name, timeout
        self._process = self._start()

    def ask(self, case: Case) -> dict[str, Any] | str:
        """Figures of a case, or why there are none: "timeout" or "crash"."""
        assert self._process.stdin is not None
        request = {"schema": case.schema, "instances": case.instances}
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._read(self._timeout)
        except BrokenPipeError:
            line = b""
        if line:
            return dict(json.loads(line))
        self.stop()
        self._process = self._start()
        return "timeout" if line is None else "crash"

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", self._name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        if self._read(120.0) != b"ready\n":
            raise SystemExit(f"{self._name} cannot be started")
        return self._process

    def _read(self, timeout: float) -> bytes | None:
        """A line; empty at the end of the stream, None when it takes too long."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        return self._process.stdout.readline() if ready else None


def run_all(name: str, cases: Sequence[Case], timeout: float, log: Path | None) -> dict[str, Figures]:
    """Figures of a library for each source of cases; each answer goes to a line of `log` at once."""
    figures = {case.source: Figures() for case in cases}
    worker = Worker(name, timeout)
    with open(log.with_suffix(f".{name}.jsonl") if log else os.devnull, "w", encoding="utf-8") as lines:
        for case in cases:
            answer = worker.ask(case)
            if isinstance(answer, dict):
                figures[case.source].add(answer)
                answer.pop("masks", None)
            elif answer == "timeout":
                figures[case.source].timeouts += 1
            else:
                figures[case.source].crashes += 1
            print(json.dumps([case.schema, answer]), file=lines, flush=True)
    worker.stop()
    return figures


def compare(names: Sequence[str], cases: Sequence[Case], timeout: float, log: Path | None) -> None:
    table = {name: run_all(name, cases, timeout, log) for name in names}
    for source in table[names[0]]:
        rows = {name: figures[source].rows() for name, figures in table.items()}
        print(f"\n| {source}: {sum(case.source == source for case in cases)} schemas | {' | '.join(rows)} |")
        print("| --- |" + " --- |" * len(rows))
        for row in rows[names[0]]:
            print(f"| {row} | {' | '.join(found[row] for found in rows.values())} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--suite", type=Path, help="checkout of the JSON-Schema-Test-Suite")
    parser.add_argument("--bench", type=Path, help="checkout of jsonschemabench")
    parser.add_argument("--sample", type=int, default=2500, help="schemas to draw from the bench")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds for one schema and its instances")
    parser.add_argument("--only", choices=LIBRARIES, action="append", help="a library to run; default: all")
    parser.add_argument("--log", type=Path, help="write each answer to FILE.<library>.jsonl")
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    if arguments.suite is None or arguments.bench is None:
        parser.error("--suite and --bench are needed")
    cases = [*load_suite(arguments.suite), *load_bench(arguments.bench, arguments.sample, arguments.seed)]
    compare(arguments.only or list(LIBRARIES), cases, arguments.timeout, arguments.log)


if __name__ == "__main__":
    main()
