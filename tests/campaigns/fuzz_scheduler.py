"""Random operations on schedulers, as many as asked for: `python -m tests.campaigns.fuzz_scheduler`.

The test of 100,000 operations at more length. Ends at the first fault, naming the seed that shows it again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.engine.operations import live

OPERATIONS_OF_A_LIFE = 5_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1, help="of the first scheduler; each gets the next")
    arguments = parser.parse_args()
    started = time.monotonic()
    seen: Counter[str] = Counter()
    left, seed = arguments.operations, arguments.seed
    while left > 0:
        operations = min(left, OPERATIONS_OF_A_LIFE)
        try:
            seen.update(live(seed, operations))
        except Exception:
            print(f"seed {seed} with {operations} operations fails", file=sys.stderr)
            raise
        left, seed = left - operations, seed + 1
    print(f"{arguments.operations} operations on {seed - arguments.seed} schedulers, no fault, in", end=" ")
    print(f"{time.monotonic() - started:.0f} s: {', '.join(f'{kind} {count}' for kind, count in seen.most_common())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
