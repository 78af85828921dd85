"""What came of a campaign, and how it is told."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from tests.campaigns.processes import Held


@dataclass
class Result:
    """`misses`: what must not happen → how often, and the first request that it happened to."""

    statuses: Counter[tuple[str, str]] = field(default_factory=Counter)
    families: Counter[str] = field(default_factory=Counter)
    misses: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    seconds: float = 0.0
    own_seconds: float = 0.0
    slowest: list[tuple[float, int, str]] = field(default_factory=list)
    live_seconds: list[float] = field(default_factory=list)
    neighbours: int = 0
    stalls: dict[str, float] = field(default_factory=dict)
    lag: float = 0.0
    before: list[Held] = field(default_factory=list)
    after: list[Held] = field(default_factory=list)

    def miss(self, what: str, number: int = -1) -> None:
        self.misses[what].append(number)

    def table(self) -> str:
        """For people to read."""
        return "\n".join([*self._statuses(), "", *self._times(), *self._processes(), *self._verdict()])

    def _statuses(self) -> list[str]:
        statuses = sorted({status for _, status in self.statuses})
        rows = [["", *statuses]]
        for endpoint in sorted({endpoint for endpoint, _ in self.statuses}):
            rows.append([endpoint, *(str(self.statuses[endpoint, status] or "") for status in statuses)])
        sums = [sum(count for (_, one), count in self.statuses.items() if one == status) for status in statuses]
        rows.append(["all", *map(str, sums)])
        return ["".join(f"{cell:>{9 if column else 24}}" for column, cell in enumerate(row)) for row in rows]

    def _times(self) -> list[str]:
        count, live = sum(self.families.values()), sorted(self.live_seconds) or [0.0]
        p99 = live[len(live) * 99 // 100]
        slowest = [f"{seconds:.2f} s ({family}, {number})" for seconds, number, family in reversed(self.slowest)]
        return [
            f"{count} requests in {self.seconds:.1f} s, {count / max(self.seconds, 1e-9):.0f} a second; "
            f"{self.own_seconds:.1f} s of processor time were the client's own",
            ", ".join(f"{number} {family}" for family, number in self.families.most_common()),
            f"{self.neighbours} harmless requests between them",
            f"/health/live: {len(live)} times, median {1e3 * live[len(live) // 2]:.1f} ms, p99 {1e3 * p99:.1f} ms, "
            f"slowest {1e3 * live[-1]:.1f} ms",
            f"event loop: longest wait {1e3 * self.lag:.0f} ms; waits over 100 ms by cause: "
            + ", ".join(f"{cause} {number:g}" for cause, number in self.stalls.items()),
            f"slowest: {', '.join(slowest)}",
        ]

    def _processes(self) -> list[str]:
        pairs = itertools.zip_longest(self.before, self.after)
        return ["  →  ".join("none" if held is None else _told(held) for held in pair) for pair in pairs]

    def _verdict(self) -> list[str]:
        lines = [f"MISS {len(numbers)} times: {what}; first in {numbers[:5]}" for what, numbers in self.misses.items()]
        return [*lines, f"{len(self.misses)} kinds of misses" if lines else "nothing is wrong"]


def _told(held: Held) -> str:
    sizes = f"{held.files} files, {held.threads} threads, {held.memory:.0f} MiB"
    return f"{held.role} {held.pid}: {sizes}, {held.seconds:.1f} s"
