"""Who may come in, and when to come again if not: bounds on requests, waiting tokens and each key's share.

Counts what is here by holds. A hold stands for one request, from the moment it is taken until it has ended, wherever it
ends. Knows numbers and a clock; lives in one event loop.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType

from server.errors import CapacityError, QuotaError
from server.types import KeyLimits

MIN_RETRY_SECONDS = 1.0
MAX_RETRY_SECONDS = 60.0
RATE_SECONDS = 20.0  # what "recently" means for the rates that Retry-After follows from
# Until something has been measured: answers that end and prompt tokens that are computed in a second.
UNKNOWN_ENDS = 1.0
UNKNOWN_COMPUTED = 200.0

NO_LIMITS = KeyLimits()


class Admission:
    """Bounds on what one engine is given."""

    def __init__(
        self,
        *,
        max_in_flight: int,
        max_queued_tokens: int | None,
        key_limits: Callable[[str], KeyLimits] = lambda name: NO_LIMITS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_in_flight` counts answers; `max_queued_tokens` prompt tokens not yet computed, None: no bound."""
        self.max_queued_tokens = max_queued_tokens
        self._max_in_flight = max_in_flight
        self._key_limits = key_limits
        self._clock = clock
        self._num_answers = 0
        self._requests_of: Counter[str] = Counter()
        self._queued_tokens = 0
        self._budgets: dict[str, _Budget] = {}
        self._ends = _Rate(clock, unknown=UNKNOWN_ENDS)
        self._computed = _Rate(clock, unknown=UNKNOWN_COMPUTED)

    @property
    def num_in_flight(self) -> int:
        """Answers that run, wait or are being prepared."""
        return self._num_answers

    @property
    def num_queued_tokens(self) -> int:
        return self._queued_tokens

    # -- may it come in ------------------------------------------------------------------------------------------

    def check(self, key: str) -> None:
        """Raise CapacityError when nobody can be taken, QuotaError when this key has had its share."""
        if self._num_answers >= self._max_in_flight:
            raise CapacityError(
                f"the queue is full: {self._num_answers} requests are running or waiting, the limit is "
                f"{self._max_in_flight}",
                # When half of them are gone: all who are sent away now will come again at about the same time.
                retry_after=_bounded(self._num_answers / 2 / self._ends.per_second),
            )
        limits = self._key_limits(key)
        if limits.max_reqs is not None and self._requests_of[key] >= limits.max_reqs:
            here = self._requests_of[key]
            raise QuotaError(
                f"this API key has {here} requests running or waiting, the limit is {limits.max_reqs}",
                retry_after=_bounded(1 / self._ends.per_second),
            )
        if limits.tokens_per_minute is not None:
            self._budget(key, limits.tokens_per_minute).check()

    def check_answers(self, count: int) -> None:
        """Raise CapacityError where a response of many answers would crowd out those that are here."""
        here = self._num_answers
        if count > 1 and here and here + count > self._max_in_flight:
            raise CapacityError(
                f"the queue is full: {here} answers are running or waiting, {count} more are asked for, the limit is "
                f"{self._max_in_flight}",
                retry_after=_bounded(count / self._ends.per_second),
            )

    def _check_tokens(self, num_tokens: int) -> None:
        limit = self.max_queued_tokens
        if limit is not None and self._queued_tokens and self._queued_tokens + num_tokens > limit:
            raise CapacityError(
                f"the queue is full: {self._queued_tokens} prompt tokens wait to be computed and this request has "
                f"{num_tokens}, the limit is {limit}",
                retry_after=_bounded(min(num_tokens, limit) / self._computed.per_second),
            )

    # -- what is here --------------------------------------------------------------------------------------------

    def hold(self, key: str, *, answers: int = 1) -> Hold:
        """A place for a request that has been let in; to be used as a context."""
        return Hold(self, key, answers)

    def charge(self, key: str, num_tokens: int) -> None:
        """Take computed or generated tokens off a key's budget, which may go into debt."""
        limit = self._key_limits(key).tokens_per_minute
        if limit is not None:
            self._budget(key, limit).spend(num_tokens)

    def note_end(self, num_answers: int) -> None:
        """Answers have ended by themselves: Retry-After follows from how many do."""
        self._ends.add(num_answers)

    def note_computed(self, num_prompt_tokens: int) -> None:
        self._computed.add(num_prompt_tokens)

    def _budget(self, key: str, tokens_per_minute: int) -> _Budget:
        # Names are the operator's, so there are only so many.
        return self._budgets.setdefault(key, _Budget(tokens_per_minute, self._clock))


class Hold:
    """One request's part in the counts, from `__enter__` to `__exit__`."""

    def __init__(self, admission: Admission, key: str, answers: int) -> None:
        self._admission = admission
        self._key = key
        self._answers = answers
        self._tokens = 0

    def __enter__(self) -> Hold:
        self._admission._num_answers += self._answers
        self._admission._requests_of[self._key] += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop_waiting()
        admission = self._admission
        admission._num_answers -= self._answers
        admission._requests_of[self._key] -= 1
        if not admission._requests_of[self._key]:
            del admission._requests_of[self._key]

    def wait(self, num_tokens: int, *, check: bool = True) -> None:
        """Count prompt tokens as waiting. Raises CapacityError when too many do; `check` is for those let in before."""
        if check:
            self._admission._check_tokens(num_tokens)
        self._admission._queued_tokens += num_tokens
        self._tokens += num_tokens

    def stop_waiting(self) -> None:
        """They are computed, or never will be."""
        self._admission._queued_tokens -= self._tokens
        self._tokens = 0


class _Rate:
    """Events a second over about the last `RATE_SECONDS`."""

    def __init__(self, clock: Callable[[], float], *, unknown: float) -> None:
        self._clock = clock
        self._unknown = unknown
        self._is_known = False
        self._weight = 0.0
        self._time = clock()

    def add(self, count: float) -> None:
        self._decay()
        self._weight += count
        self._is_known = True

    @property
    def per_second(self) -> float:
        """Never 0: what has not happened lately may still happen once in `RATE_SECONDS`."""
        if not self._is_known:
            return self._unknown
        self._decay()
        return max(self._weight, 1.0) / RATE_SECONDS

    def _decay(self) -> None:
        now = self._clock()
        self._weight *= math.exp((self._time - now) / RATE_SECONDS)
        self._time = now


class _Budget:
    """A minute's tokens, refilled steadily. Requests come in while something is left, and may spend more than that."""

    def __init__(self, tokens_per_minute: int, clock: Callable[[], float]) -> None:
        self._limit = tokens_per_minute
        self._clock = clock
        self._left = float(tokens_per_minute)
        self._time = clock()

    def check(self) -> None:
        """Raises QuotaError while nothing is left."""
        self._refill()
        if self._left <= 0:
            raise QuotaError(
                f"this API key has used its tokens of a minute: the limit is {self._limit}",
                retry_after=max((1 - self._left) * 60 / self._limit, MIN_RETRY_SECONDS),
            )

    def spend(self, num_tokens: int) -> None:
        self._refill()
        self._left -= num_tokens

    def _refill(self) -> None:
        now = self._clock()
        self._left = min(self._left + (now - self._time) * self._limit / 60, self._limit)
        self._time = now


def _bounded(seconds: float) -> float:
    return min(max(seconds, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)
