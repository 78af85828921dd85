"""The command `bench --suite`: the rows of a suite on our server and its peers, a table, a JSON file and plots."""

from __future__ import annotations

import argparse
import datetime
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from tqdm import tqdm

from server.bench.plots import PlotsError, draw, require_matplotlib
from server.bench.report import SCHEMA, machine_facts, save
from server.bench.side_by_side import Contender, RowResult, Suite, render, to_json
from server.bench.suite import Row, choose_rows
from server.bench.target import Target, TargetError, choose_vocabulary

OURS = "ours"


class FlagError(ValueError):
    """Flags that do not go together, or that need what is not installed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _LineUp:
    """The servers, ready and with their models, and what all are measured with."""

    contenders: Sequence[Contender]
    suite: Suite
    settings: dict[str, Any]


def measure_suite(args: argparse.Namespace) -> int:
    """Measure, print, save and draw. What was measured before a failure of our server is kept, too.

    Raises FlagError and UnknownRowError before anything is sent, and TargetError for that failure.
    """
    rows = _check(args)
    results: list[RowResult] = []
    with _line_up(args) as line_up:
        try:
            with tqdm(total=len(rows) * args.rounds, desc="suite", unit="round", disable=args.no_progress) as bar:
                for row in rows:
                    bar.set_postfix_str(row.name)
                    results.append(line_up.suite.measure(row, args.rounds, bar.update))
        finally:
            if results:
                _tell(args, line_up, results)
    return 0


def _check(args: argparse.Namespace) -> tuple[Row, ...]:
    """The rows to measure. Raises FlagError or UnknownRowError: an hour of measuring is not to end with either."""
    rows = choose_rows(args.suite, args.rows)
    if len({OURS, *(peer.name for peer in args.peer)}) <= len(args.peer):
        raise FlagError(f"--peer: each needs a name of its own, and {OURS} is taken")
    if args.plots is not None:
        if not any(row.curve for row in rows):
            raise FlagError("--plots draws the curves of --suite scaling")
        try:
            require_matplotlib()
            args.plots.mkdir(parents=True, exist_ok=True)
        except (PlotsError, OSError) as error:
            raise FlagError(f"--plots: {error}") from None
    return rows


@contextmanager
def _line_up(args: argparse.Namespace) -> Iterator[_LineUp]:
    """Waits until all servers are ready. Raises TargetError."""
    key = args.api_key or os.environ.get("OPENAI_API_KEY")
    targets: dict[str, Target] = {}
    contenders = []
    with ExitStack() as stack:
        for contender in (Contender(OURS, args.base_url, args.model), *args.peer):
            # The key is ours: no stranger's server gets it.
            target = Target(contender.url, api_key=key if contender.name == OURS else None)
            targets[contender.name] = stack.enter_context(target)
            contenders.append(_named(contender, target, args.ready_timeout))
        vocabulary = choose_vocabulary(targets[OURS], contenders[0].model or "", args.tokenizer)
        seed = time.time_ns() % 2**32 if args.seed is None else args.seed
        yield _LineUp(
            contenders=contenders,
            suite=Suite(contenders, targets=targets, vocabulary=vocabulary, timeout=args.timeout, seed=seed),
            settings={
                "suite": args.suite,
                "rounds": args.rounds,
                "seed": seed,
                "timeout": args.timeout,
                "tokens_counted_by": vocabulary.source,
                "contenders": [asdict(contender) for contender in contenders],
            },
        )


def _named(contender: Contender, target: Target, timeout: float) -> Contender:
    """The contender with the model that it serves, once it is ready. Raises TargetError."""
    models = target.wait_ready(timeout)
    if contender.model is None and not models:
        raise TargetError(f"{contender.name} lists no model: name one")
    return replace(contender, model=contender.model or models[0])


def _tell(args: argparse.Namespace, line_up: _LineUp, results: Sequence[RowResult]) -> None:
    machine = machine_facts()
    print(f"{machine['cpu']}, {machine['cores']} cores; medians of {args.rounds} rounds, in turn")
    print(render(results, line_up.contenders))
    if args.output is not None:
        report = {
            "schema": SCHEMA,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "config": line_up.settings,
            "machine": machine,
            "rows": to_json(results, line_up.contenders),
        }
        save(report, args.output)
    if args.plots is not None:
        for path in draw(results, args.plots):
            print(path)
