"""Run the scenarios, all or some, and print one table: what was expected, and what was seen."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
import traceback
from pathlib import Path

from server.demo.checkpoint import write_checkpoint
from tests.faults.bench import Row, Workbench
from tests.faults.scenarios import SCENARIOS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"some of: {', '.join(SCENARIOS)}; default: all")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the servers' logs here")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(SCENARIOS)
    if unknown:
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        checkpoint = Path(scratch) / "tiny"
        write_checkpoint(checkpoint, "tiny")
        found = [(name, row) for name in arguments.names or SCENARIOS for row in _run(name, checkpoint, folder / name)]
    _print_table(found)
    missed = sum(not row.ok for _, row in found)
    print(f"\n{len(found) - missed} of {len(found)} as expected")
    return 1 if missed else 0


def _run(name: str, checkpoint: Path, folder: Path) -> list[Row]:
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    print(f"{name} …", end=" ", flush=True)
    try:
        rows = asyncio.run(SCENARIOS[name](Workbench(checkpoint, folder)))
    except Exception as error:
        traceback.print_exc()
        rows = [Row("the scenario itself", "runs to its end", type(error).__name__, ok=False)]
    print(f"{sum(row.ok for row in rows)}/{len(rows)} in {time.monotonic() - started:.0f} s", flush=True)
    return rows


def _print_table(found: list[tuple[str, Row]]) -> None:
    last = ""
    for name, row in found:
        if name != last:
            print(f"\n{name}")
            last = name
        print(f"  {'ok  ' if row.ok else 'MISS'} {row.what}: expected {row.expected}; seen {row.seen}")


if __name__ == "__main__":
    sys.exit(main())
