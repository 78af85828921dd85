"""Requests that are here but may not be scheduled yet, each waiting for one thing to happen.

A request whose grammar is being compiled waits for that; the further answers to a prompt wait until the first one has
computed it, and then find its blocks. Holds no blocks and no slots.
"""

from __future__ import annotations

from server.engine.request import Request


class HeldRequests:
    """Who waits for which event. Events are named by strings; each request waits for one."""

    def __init__(self) -> None:
        self._waiting_for: dict[str, list[Request]] = {}
        self._event_of: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._event_of)

    def hold(self, request: Request, event: str) -> None:
        self._waiting_for.setdefault(event, []).append(request)
        self._event_of[request.request_id] = event

    def release(self, event: str) -> list[Request]:
        """Those who waited for an event that has happened, in the order in which they came."""
        released = self._waiting_for.pop(event, [])
        for request in released:
            del self._event_of[request.request_id]
        return released

    def remove(self, request_id: str) -> None:
        """Take one out that need not wait any more."""
        event = self._event_of.pop(request_id)
        left = [request for request in self._waiting_for[event] if request.request_id != request_id]
        if left:
            self._waiting_for[event] = left
        else:
            del self._waiting_for[event]
