"""Log-probabilities as a client sees them: each token with the very bytes that it adds to the answer.

Knows the vocabulary as bytes; knows nothing of wires.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import msgspec

from server.outputs.detokenizer import TokenTable
from server.types import Logprob, TokenLogprobs

PACK_TOKENS = 16

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(list[TokenLogprobs]).decode


class PendingLogprobs:
    """Entries of one answer that its reader has not taken. A slow reader's are packed: with 20 alternatives an entry
    is 300 bytes then, and 4 KiB as objects."""

    def __init__(self) -> None:
        self._packed: deque[bytes] = deque()
        self._latest: list[TokenLogprobs] = []

    def add(self, entries: Iterable[TokenLogprobs]) -> None:
        self._latest += entries
        if len(self._latest) >= PACK_TOKENS:
            self._packed.append(_pack(self._latest))
            self._latest.clear()

    def take(self, count: int) -> list[TokenLogprobs]:
        """The first `count`, or all if there are fewer."""
        entries: list[TokenLogprobs] = []
        while self._packed and len(entries) < count:
            entries += _unpack(self._packed.popleft())
        if len(entries) > count:
            self._packed.appendleft(_pack(entries[count:]))
        else:
            missing = count - len(entries)
            entries += self._latest[:missing]
            del self._latest[:missing]
        return entries[:count]


class LogprobWriter:
    """Writes one answer's entries in order; the bytes of all of them are the bytes of its text.

    `at_start` drops the space in front of the first word, as the detokenizer does.
    """

    def __init__(self, table: TokenTable, *, skip_special_tokens: bool, at_start: bool) -> None:
        self._table = table
        self._skip_special = skip_special_tokens
        self._at_start = at_start

    def write(self, entries: Iterable[TokenLogprobs]) -> list[Logprob]:
        return [self._write_one(entry) for entry in entries]

    def _write_one(self, entry: TokenLogprobs) -> Logprob:
        top = tuple(self._describe(token_id, logprob) for token_id, logprob in entry.top)
        written = self._describe(entry.token_id, entry.logprob, top)
        if self._adds(entry.token_id):
            self._at_start = False
        return written

    def _adds(self, token_id: int) -> bytes:
        """The token's bytes, wherever it stands; none for a special token that is not shown."""
        if self._skip_special and token_id in self._table.special_ids:
            return b""
        return self._table.get(token_id)

    def _describe(self, token_id: int, logprob: float, top: tuple[Logprob, ...] = ()) -> Logprob:
        data = self._adds(token_id)
        if self._at_start:
            data = data.removeprefix(b" ")
        is_hidden = self._skip_special and token_id in self._table.special_ids
        shown = self._table.get(token_id) if is_hidden else data
        return Logprob(token_id, shown.decode("utf-8", errors="replace"), data, logprob, top)
