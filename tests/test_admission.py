"""Who comes in: bounds on requests, waiting tokens and each key's share, and what Retry-After says."""

from __future__ import annotations

import pytest

from server.admission import MAX_RETRY_SECONDS, MIN_RETRY_SECONDS, RATE_SECONDS, UNKNOWN_ENDS, Admission
from server.errors import CapacityError, QuotaError
from server.types import KeyLimits


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(
    *, max_in_flight: int = 4, max_queued_tokens: int | None = 100, limits: dict[str, KeyLimits] | None = None
) -> tuple[Admission, Clock]:
    clock = Clock()
    found = limits or {}
    admission = Admission(
        max_in_flight=max_in_flight,
        max_queued_tokens=max_queued_tokens,
        key_limits=lambda name: found.get(name, KeyLimits()),
        clock=clock,
    )
    return admission, clock


def retry_after(error: CapacityError) -> float:
    assert error.retry_after is not None
    return error.retry_after


def test_answers_are_counted_from_hold_to_end() -> None:
    admission, _ = make()
    with admission.hold("a", answers=3), admission.hold("b"):
        assert admission.num_in_flight == 4
        with pytest.raises(CapacityError, match="4 requests are running or waiting, the limit is 4"):
            admission.check("c")
    assert admission.num_in_flight == 0
    admission.check("c")


def test_a_hold_is_given_back_whatever_happens() -> None:
    admission, _ = make()

    def work() -> None:
        with admission.hold("a") as hold:
            hold.wait(50)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert (admission.num_in_flight, admission.num_queued_tokens) == (0, 0)


def test_waiting_tokens_are_bounded_but_one_request_may_always_wait() -> None:
    admission, _ = make()
    with admission.hold("") as first, admission.hold("") as second:
        first.wait(1000)
        with pytest.raises(CapacityError, match=r"1000 prompt tokens wait .* has 5, the limit is 100"):
            second.wait(5)
        assert admission.num_queued_tokens == 1000
        first.stop_waiting()
        second.wait(60)
        second.wait(500, check=False)
        assert admission.num_queued_tokens == 560
    assert admission.num_queued_tokens == 0


def test_many_answers_do_not_crowd_out_those_that_are_here() -> None:
    admission, _ = make()
    admission.check_answers(9)
    with admission.hold(""):
        admission.check_answers(3)
        with pytest.raises(CapacityError, match="1 answers are running or waiting, 4 more"):
            admission.check_answers(4)


def test_retry_after_follows_the_measured_rate() -> None:
    admission, clock = make(max_in_flight=40)
    with admission.hold("", answers=40):
        with pytest.raises(CapacityError) as caught:
            admission.check("")
        assert retry_after(caught.value) == 20 / UNKNOWN_ENDS  # nothing has ever ended
        for _ in range(200):  # five a second
            clock.now += 1.0
            admission.note_end(5)
        with pytest.raises(CapacityError) as caught:
            admission.check("")
        # Half of what is here, at five a second.
        assert retry_after(caught.value) == pytest.approx(20 / 5, rel=0.1)
        clock.now += 10 * RATE_SECONDS
        with pytest.raises(CapacityError) as caught:
            admission.check("")
        assert retry_after(caught.value) == MAX_RETRY_SECONDS


def test_retry_after_of_waiting_tokens_follows_the_tokens_computed() -> None:
    admission, clock = make()
    for _ in range(200):
        clock.now += 1.0
        admission.note_computed(20)
    with admission.hold("") as first, admission.hold("") as second:
        first.wait(100)
        with pytest.raises(CapacityError) as caught:
            second.wait(80)
        assert retry_after(caught.value) == pytest.approx(80 / 20, rel=0.1)
        with pytest.raises(CapacityError) as caught:
            second.wait(1)
        assert retry_after(caught.value) == MIN_RETRY_SECONDS


def test_a_key_has_a_share_of_its_own() -> None:
    admission, _ = make(limits={"a": KeyLimits(max_reqs=2)})
    with admission.hold("a"), admission.hold("a"):
        with pytest.raises(QuotaError, match="2 requests running or waiting, the limit is 2") as caught:
            admission.check("a")
        assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
        admission.check("b")
    admission.check("a")


def test_a_budget_of_tokens_refills_and_may_go_into_debt() -> None:
    admission, clock = make(limits={"a": KeyLimits(tokens_per_minute=600)})
    admission.charge("b", 10**9)
    admission.check("b")
    admission.check("a")
    admission.charge("a", 700)
    with pytest.raises(QuotaError, match="the limit is 600") as caught:
        admission.check("a")
    assert retry_after(caught.value) == pytest.approx(10.1)
    clock.now += retry_after(caught.value)
    admission.check("a")
    clock.now += 1000
    admission.charge("a", 599)  # no more than a minute's worth is saved up
    admission.check("a")
    admission.charge("a", 1)
    with pytest.raises(QuotaError):
        admission.check("a")
