from __future__ import annotations

from server.engine.held import HeldRequests
from server.engine.request import Request
from tests.factories import make_request


def make_requests(count: int) -> list[Request]:
    return [Request(make_request(4), order) for order in range(count)]


def test_an_event_releases_those_who_wait_for_it_in_order_and_once() -> None:
    held = HeldRequests()
    first, second, other = make_requests(3)
    held.hold(first, "a")
    held.hold(other, "b")
    held.hold(second, "a")
    assert len(held) == 3
    assert held.release("a") == [first, second]
    assert held.release("a") == []
    assert len(held) == 1


def test_who_is_removed_is_not_released() -> None:
    held = HeldRequests()
    first, second = make_requests(2)
    held.hold(first, "a")
    held.hold(second, "a")
    held.remove(first.request_id)
    assert held.release("a") == [second]
    assert len(held) == 0


def test_nothing_is_kept_of_an_event_that_nobody_waits_for_any_more() -> None:
    held = HeldRequests()
    (request,) = make_requests(1)
    held.hold(request, "a")
    held.remove(request.request_id)
    assert len(held) == 0
    assert not held._waiting_for
