from __future__ import annotations

import random

import pytest

from server.engine.queue import WaitingQueue
from server.engine.request import Request
from server.types import RequestOrigin
from tests.factories import make_request


def request(order: int, *, priority: int = 0, request_id: str | None = None, key: str = "", prompt: int = 4) -> Request:
    origin = RequestOrigin(key=key)
    return Request(make_request(prompt, priority=priority, request_id=request_id, origin=origin), order)


def test_priority_first_then_arrival() -> None:
    queue = WaitingQueue()
    later, urgent, earlier, late = request(2), request(3, priority=-1), request(1), request(0, priority=1)
    for item in (later, urgent, earlier, late):
        queue.push(item)
    assert [queue.pop() for _ in range(4)] == [urgent, earlier, later, late]
    assert queue.peek() is None
    with pytest.raises(IndexError):
        queue.pop()


def test_peek_shows_what_pop_takes() -> None:
    queue = WaitingQueue()
    for order in (2, 1, 3):
        queue.push(request(order))
    while (shown := queue.peek()) is not None:
        assert queue.peek() is shown
        assert shown.request_id in queue
        assert queue.pop() is shown
        assert shown.request_id not in queue
    assert len(queue) == 0


def test_what_is_removed_never_comes() -> None:
    queue = WaitingQueue()
    items = [request(order) for order in range(5)]
    for item in items:
        queue.push(item)
    for index in (0, 3, 4):
        queue.remove(items[index].request_id)
    queue.remove("never there")
    assert len(queue) == 2
    assert items[0].request_id not in queue
    assert [queue.pop(), queue.pop()] == items[1:3]
    assert queue.peek() is None


def test_a_preempted_request_keeps_its_place() -> None:
    queue = WaitingQueue()
    first, second, third = (request(order) for order in range(3))
    for item in (first, second, third):
        queue.push(item)
    assert queue.pop() is first
    queue.push(first)
    assert [queue.pop() for _ in range(3)] == [first, second, third]


def test_random_operations_against_a_sorted_list() -> None:
    rng = random.Random(1)
    queue = WaitingQueue()
    expected: list[Request] = []
    for order in range(2000):
        roll = rng.random()
        if roll < 0.5:
            item = request(order, priority=rng.randint(-2, 2))
            queue.push(item)
            expected.append(item)
        elif roll < 0.75 and expected:
            item = expected.pop(rng.randrange(len(expected)))
            queue.remove(item.request_id)
        elif expected:
            first = min(expected, key=lambda item: item.rank)
            expected.remove(first)
            assert queue.pop() is first
        assert len(queue) == len(expected)


def test_an_id_may_come_again_after_its_removal() -> None:
    queue = WaitingQueue()
    first, second = request(0, request_id="same"), request(1, request_id="same")
    queue.push(first)
    queue.remove("same")
    queue.push(second)
    assert queue.pop() is second


def test_what_is_removed_is_let_go() -> None:
    queue = WaitingQueue()
    queue.push(request(0))
    for order in range(1, 1001):
        item = request(order)
        queue.push(item)
        queue.remove(item.request_id)
    assert len(queue) == 1
    assert len(queue._lines[""]._heap) < 100


def pop_keys(queue: WaitingQueue, count: int) -> str:
    return "".join(queue.pop().key for _ in range(count))


def test_keys_take_turns_however_many_requests_one_has() -> None:
    queue = WaitingQueue()
    for order in range(10):
        queue.push(request(order, key="a"))
    for order in range(10, 13):
        queue.push(request(order, key="b"))
    assert pop_keys(queue, 8) == "abababaa"


def test_turns_are_measured_in_tokens() -> None:
    queue = WaitingQueue()
    for order in range(4):
        queue.push(request(order, key="a", prompt=40))
    for order in range(4, 14):
        queue.push(request(order, key="b", prompt=10))
    assert pop_keys(queue, 10) == "abbbbabbbb"
    queue.charge("a", 1000)  # its answers
    queue.push(request(20, key="b"))
    assert pop_keys(queue, 4) == "bbba"


def test_priorities_order_a_keys_own_requests_and_nobody_elses() -> None:
    queue = WaitingQueue()
    modest = [request(order, key="a") for order in (0, 1)]
    pushy = [request(2, key="b", priority=5), request(3, key="b", priority=-100), request(4, key="b", priority=-99)]
    for item in modest + pushy:
        queue.push(item)
    assert [queue.pop() for _ in range(5)] == [modest[0], pushy[1], modest[1], pushy[2], pushy[0]]


def test_turns_are_not_saved_up() -> None:
    """A key that comes late does not get all at once what it never asked for."""
    queue = WaitingQueue()
    for order in range(100):
        queue.push(request(order, key="a"))
    pop_keys(queue, 90)
    for order in range(100, 120):
        queue.push(request(order, key="b"))
    assert pop_keys(queue, 6) in ("bababa", "ababab")


def test_a_preempted_request_is_charged_once() -> None:
    queue = WaitingQueue()
    queue.push(request(0, key="a", prompt=100))
    again = queue.pop()
    again.num_preemptions = 1
    for item in (again, request(1, key="a"), *(request(order, key="b", prompt=60) for order in (2, 3, 4))):
        queue.push(item)
    assert pop_keys(queue, 5) == "bbaab"


def test_a_line_that_empties_leaves_nothing_behind() -> None:
    queue = WaitingQueue()
    for order in range(3):
        queue.push(request(order, key=str(order), request_id=str(order)))
    queue.remove("1")
    assert pop_keys(queue, 2) == "02"
    assert (len(queue), queue.peek()) == (0, None)
    assert not queue._lines
