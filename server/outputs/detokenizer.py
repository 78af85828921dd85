"""Token ids to text as they come: exact bytes per token, characters only when complete.

Knows the vocabulary as bytes; knows nothing of requests.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class TokenTable:
    """The true bytes of every token, and which ids are special.

    SentencePiece writes a space as `▁` (U+2581) and a byte without a piece of its own as `<0xE2>`.
    """

    token_bytes: Sequence[bytes]
    special_ids: frozenset[int]

    @classmethod
    def from_pieces(cls, pieces: Sequence[str | None], special_ids: Collection[int]) -> TokenTable:
        special = frozenset(special_ids)
        return cls([_piece_bytes(piece, index in special) for index, piece in enumerate(pieces)], special)

    def get(self, token_id: int) -> bytes:
        """Bytes of an id; none for ids that pad the vocabulary."""
        return self.token_bytes[token_id] if token_id < len(self.token_bytes) else b""


def _piece_bytes(piece: str | None, is_special: bool) -> bytes:
    if piece is None:
        return b""
    if is_special:
        return piece.encode()
    match = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else piece.replace("▁", " ").encode()


class Detokenizer:
    """Incremental decoding of one answer.

    At the start of a text its first character is dropped when it is a space: pieces mark the space before a word, and
    an answer begins right after a prompt that ends without one. Bytes that are not UTF-8 become U+FFFD.
    """

    def __init__(self, table: TokenTable, *, skip_special_tokens: bool, at_start: bool = True) -> None:
        self._table = table
        self._skip_special = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = at_start

    def push(self, token_ids: Iterable[int]) -> str:
        """Text that these ids complete."""
        data = b"".join(
            self._table.get(token_id)
            for token_id in token_ids
            if not (self._skip_special and token_id in self._table.special_ids)
        )
        return self._strip(self._decoder.decode(data))

    def flush(self) -> str:
        """What is left when no more ids come."""
        return self._strip(self._decoder.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            return text.removeprefix(" ")
        return text
