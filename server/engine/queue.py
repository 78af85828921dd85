"""Requests that wait. Keys take turns by what each has been given; a key's own requests go by priority, then arrival.

One key's flood, or priorities, cannot keep another's request from its turn (start-time fair queueing: Goyal, Vin and
Cheng 1996, with tokens as the measure of service). Without keys there is one line. A preempted request keeps its place.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from server.engine.request import Request

MIN_DEAD_ENTRIES = 32  # fewer are not worth a clean-up


class WaitingQueue:
    """A line for each key: O(log n) amortised in a line's length, and O(keys) to find whose turn it is."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._key_of: dict[str, str] = {}
        self._served: dict[str, int] = {}  # tokens; keys are the operator's, so there are only so many
        self._time = 0  # what the key had been given whose turn it was last

    def __len__(self) -> int:
        return len(self._key_of)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._key_of

    def push(self, request: Request) -> None:
        if request.request_id in self._key_of:
            raise ValueError(f"request {request.request_id} waits already")
        key = request.key
        if key not in self._lines:
            self._lines[key] = _Line()
            # Turns that a key did not want are not saved up.
            self._served[key] = max(self._served.get(key, 0), self._time)
        self._lines[key].push(request)
        self._key_of[request.request_id] = key

    def peek(self) -> Request | None:
        """The next request to run, or None."""
        if not self._lines:
            return None
        heads = [line.peek() for line in self._lines.values()]
        return min(heads, key=lambda head: (self._served[head.key], head.order))

    def pop(self) -> Request:
        """Take what `peek` shows."""
        request = self.peek()
        if request is None:
            raise IndexError("the queue is empty")
        self.take(request)
        return request

    def take(self, request: Request) -> None:
        """Take any of them out to run, and charge its prompt to its key unless it has been here before."""
        self._time = max(self._time, self._served[request.key])
        if not request.num_preemptions:
            self.charge(request.key, request.num_tokens)
        self.remove(request.request_id)

    def served(self, key: str) -> int:
        """Tokens that a key has been given; only comparisons between keys mean something."""
        return self._served.get(key, 0)

    def charge(self, key: str, num_tokens: int) -> None:
        """A key has been given that much service."""
        self._served[key] = self._served.get(key, 0) + num_tokens

    def remove(self, request_id: str) -> None:
        """Drop a request, with all that it refers to; unknown ids are ignored."""
        key = self._key_of.pop(request_id, None)
        if key is None:
            return
        line = self._lines[key]
        line.remove(request_id)
        if not line:
            del self._lines[key]


@dataclass(order=True, slots=True)
class _Entry:
    """A place in a line; `request` is None once it was removed."""

    rank: tuple[int, int]
    pushed: int
    request: Request | None = field(compare=False)


class _Line:
    """A heap in which removal leaves an empty entry behind. It is dropped as soon as nobody waits in it."""

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._entries: dict[str, _Entry] = {}
        self._num_pushed = 0

    def __len__(self) -> int:
        return len(self._entries)

    def push(self, request: Request) -> None:
        entry = _Entry(request.rank, self._num_pushed, request)
        self._num_pushed += 1
        self._entries[request.request_id] = entry
        heapq.heappush(self._heap, entry)

    def peek(self) -> Request:
        while (request := self._heap[0].request) is None:
            heapq.heappop(self._heap)
        return request

    def remove(self, request_id: str) -> None:
        entry = self._entries.pop(request_id)
        entry.request = None
        num_dead = len(self._heap) - len(self._entries)
        if num_dead > max(MIN_DEAD_ENTRIES, len(self._entries)):
            self._heap = [entry for entry in self._heap if entry.request is not None]
            heapq.heapify(self._heap)
