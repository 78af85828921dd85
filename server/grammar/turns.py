"""A few things lent to many, so that nobody who asks for much makes the others wait long.

Knows neither what is lent nor who asks. Lives in one event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Turns(Generic[Item]):
    """Items that are taken and given back. Those who wait under different keys take turns.

    A key holds one item at a time, however many are free. Those without one ("") cannot be told apart, so all items
    are theirs.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        self._free = list(items)
        self._holders: set[str] = set()
        self._waiting: dict[str, deque[asyncio.Future[Item]]] = {}  # whose turn is next stands first

    async def take(self, key: str) -> Item:
        """Whoever gets an item gives it back under the same key. Raises what `refuse_all` was given."""
        turn: asyncio.Future[Item] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append(turn)
        self._hand_out()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # both happened before this task ran again
                self.give_back(turn.result(), key)
            self._forget(turn, key)
            raise

    def give_back(self, item: Item, key: str) -> None:
        self._free.append(item)
        self._holders.discard(key)
        self._hand_out()

    def refuse_all(self, error: Exception) -> None:
        """End all waiting."""
        for turns in self._waiting.values():
            for turn in turns:
                if not turn.done():
                    turn.set_exception(error)
        self._waiting.clear()

    def _hand_out(self) -> None:
        while self._free:
            key = next((key for key in self._waiting if key not in self._holders), None)
            if key is None:
                return
            turns = self._waiting.pop(key)
            turn = turns.popleft()
            if turns:
                self._waiting[key] = turns  # behind all others
            if turn.done():  # cancelled, and not forgotten yet
                continue
            if key:
                self._holders.add(key)
            turn.set_result(self._free.pop())

    def _forget(self, turn: asyncio.Future[Item], key: str) -> None:
        turns = self._waiting.get(key)
        if turns is not None and turn in turns:
            turns.remove(turn)
            if not turns:
                del self._waiting[key]
