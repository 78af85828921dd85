"""Requests that wait: by priority, then in order of arrival. A preempted one keeps its place of arrival."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from server.engine.request import Request

MIN_DEAD_ENTRIES = 32  # fewer are not worth a clean-up


@dataclass(order=True, slots=True)
class _Entry:
    """A place in the queue; `request` is None once it was removed."""

    rank: tuple[int, int]
    pushed: int
    request: Request | None = field(compare=False)


class WaitingQueue:
    """A heap in which removal leaves an empty entry behind; all operations are O(log n) amortised."""

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._entries: dict[str, _Entry] = {}
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    def push(self, request: Request) -> None:
        if request.request_id in self._entries:
            raise ValueError(f"request {request.request_id} waits already")
        entry = _Entry(request.rank, self._num_pushed, request)
        self._num_pushed += 1
        self._entries[request.request_id] = entry
        heapq.heappush(self._heap, entry)

    def peek(self) -> Request | None:
        """The next request to run, or None."""
        while self._heap and self._heap[0].request is None:
            heapq.heappop(self._heap)
        return self._heap[0].request if self._heap else None

    def pop(self) -> Request:
        """Take what `peek` showed."""
        request = self.peek()
        if request is None:
            raise IndexError("the queue is empty")
        heapq.heappop(self._heap)
        del self._entries[request.request_id]
        return request

    def remove(self, request_id: str) -> None:
        """Drop a request, with all that it refers to; unknown ids are ignored."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return
        entry.request = None
        num_dead = len(self._heap) - len(self._entries)
        if num_dead > max(MIN_DEAD_ENTRIES, len(self._entries)):
            self._heap = [entry for entry in self._heap if entry.request is not None]
            heapq.heapify(self._heap)
