from __future__ import annotations

import random

import pytest

from server.engine.queue import WaitingQueue
from server.engine.request import Request
from tests.factories import make_request


def request(order: int, *, priority: int = 0, request_id: str | None = None) -> Request:
    return Request(make_request(4, priority=priority, request_id=request_id), order)


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
    assert len(queue._heap) < 100
