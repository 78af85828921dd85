"""Requests that wait: by priority, then in order of arrival. A preempted one keeps its place of arrival."""

from __future__ import annotations

import heapq

from server.engine.request import Request


class WaitingQueue:
    """A heap with lazy removal; all operations are O(log n) amortised."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Request]] = []
        self._members: set[str] = set()

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._members

    def push(self, request: Request) -> None:
        heapq.heappush(self._heap, (request.rank, request))
        self._members.add(request.request_id)

    def peek(self) -> Request | None:
        """The next request to run, or None."""
        while self._heap and self._heap[0][1].request_id not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Request:
        """Take what `peek` showed."""
        request = self.peek()
        if request is None:
            raise IndexError("the queue is empty")
        heapq.heappop(self._heap)
        self._members.discard(request.request_id)
        return request

    def remove(self, request_id: str) -> None:
        self._members.discard(request_id)
