"""Which of several engines gets a request: the one that knows its beginning, unless others have much less to do.

Knows how much each has to do and where conversations were last; knows nothing of engines themselves. The bound on how
far an old home may be preferred is that of consistent hashing with bounded loads (Mirrokni et al., arXiv 1608.01350).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection

from server.types import EngineRequest

# What an engine that knows a request may have to do, in shares of what all have on average.
BOUND = 1.25
MAX_HOMES = 1 << 14
PREFIX_TOKENS = 64  # of a prompt without pictures: what makes it one conversation's


class Placement:
    """Loads are counts of answers that are not complete."""

    def __init__(self, num_engines: int) -> None:
        self.loads = [0] * num_engines
        self._last_turns = [0] * num_engines
        self._turn = 0
        self._homes: OrderedDict[bytes, int] = OrderedDict()

    def place(self, request: EngineRequest, available: Collection[int], *, num_answers: int) -> int:
        """Count answers to a request for one of the available engines. Returns which."""
        beginning = _beginning(request)
        home = self._homes.get(beginning)
        # Among equals whoever had nothing for longest, so that an idle server fills the caches of all.
        least = min(available, key=lambda engine: (self.loads[engine], self._last_turns[engine]))
        if home is None or home not in available or self.loads[home] > self._bound(available, num_answers):
            home = least
        self._homes[beginning] = home
        self._homes.move_to_end(beginning)
        if len(self._homes) > MAX_HOMES:
            self._homes.popitem(last=False)
        self.loads[home] += num_answers
        self._turn += 1
        self._last_turns[home] = self._turn
        return home

    def _bound(self, available: Collection[int], num_answers: int) -> float:
        """What an engine may have before this: one whole answer more than others is no reason to leave it."""
        total = sum(self.loads[engine] for engine in available) + num_answers
        return max(BOUND * total / len(available) - num_answers, min(self.loads[engine] for engine in available))

    def release(self, engine: int, *, num_answers: int) -> None:
        """The answers are complete, or not this engine's any more."""
        self.loads[engine] -= num_answers


def _beginning(request: EngineRequest) -> bytes:
    """What later turns of a conversation share with its first: its first picture, or else its first words.

    The key and the salt are part of it, as caches are not shared beyond them.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{len(request.cache_salt)} {request.cache_salt}".encode())
    if request.tiles:
        digest.update(request.tiles[0].key)
    else:
        digest.update(repr(request.prompt_token_ids[:PREFIX_TOKENS]).encode())
    return digest.digest()
