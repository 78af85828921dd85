"""What keeps one client's downloads from becoming everybody's: a share of the slots, and a pause for dead hosts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass


class KeyShares:
    """At most half of `total` things at once for one API key, all for those without a key; the rest wait.

    Only keys that hold or want something are remembered, so the table is as long as there are callers.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._shares: dict[str, _Share] = {}

    @contextlib.asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[None]:
        await self.acquire(key)
        try:
            yield
        finally:
            self.release(key)

    async def acquire(self, key: str) -> None:
        share = self._shares.get(key)
        if share is None:
            limit = max(1, self._total // 2) if key else self._total
            share = self._shares[key] = _Share(asyncio.Semaphore(limit))
        share.users += 1
        try:
            await share.slots.acquire()
        except BaseException:
            self._leave(key, share)
            raise

    def release(self, key: str) -> None:
        share = self._shares[key]
        share.slots.release()
        self._leave(key, share)

    def _leave(self, key: str, share: _Share) -> None:
        share.users -= 1
        if not share.users:
            del self._shares[key]


@dataclass
class _Share:
    slots: asyncio.Semaphore
    users: int = 0


class HostBreaker:
    """Remembers hosts that failed several times in a row, and for a while nobody waits for them.

    A failed fetch may hold its slot for the whole time limit. Five within half a minute are no accident; ten seconds
    are short enough for a host that comes back, and after them a single failure is enough. Hosts are told apart by
    who asks as well, so that no client can make a host unreachable for another.
    """

    MAX_FAILURES = 5
    WINDOW_SECONDS = 30.0
    OPEN_SECONDS = 10.0
    MAX_HOSTS = 1024  # the one that failed longest ago is forgotten first

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._streaks: OrderedDict[tuple[str, str], _Streak] = OrderedDict()

    def is_open(self, key: str, host: str) -> bool:
        """Whether the host is to be left alone for now."""
        streak = self._streaks.get((key, host))
        return streak is not None and self._clock() < streak.open_until

    def record_success(self, key: str, host: str) -> None:
        self._streaks.pop((key, host), None)

    def record_failure(self, key: str, host: str) -> None:
        now = self._clock()
        streak = self._streaks.pop((key, host), None)
        if streak is None or now - streak.last > self.WINDOW_SECONDS:
            streak = _Streak()
        streak.count += 1
        streak.last = now
        if streak.count >= self.MAX_FAILURES:
            streak.open_until = now + self.OPEN_SECONDS
        self._streaks[key, host] = streak
        if len(self._streaks) > self.MAX_HOSTS:
            self._streaks.popitem(last=False)


@dataclass
class _Streak:
    """Failures in a row. Times are the breaker's clock's."""

    count: int = 0
    last: float = 0.0
    open_until: float = 0.0
