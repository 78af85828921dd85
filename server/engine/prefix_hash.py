"""The one owner of prefix caching's keys: a chained SHA-256 over full blocks of tokens and the pictures in them.

An image token's id says nothing about its picture, so each block also folds in every tile that reaches into it: the
tile's key and where the tile starts relative to the block. Same words with another picture never share a block.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array

from server.engine.request import Request


class BlockHasher:
    """Hashes a request's full blocks, each over its parent.

    The chain starts from a secret of this process and the request's `cache_salt`, so that hashes cannot be predicted
    from outside and differently salted requests share nothing. Unless `is_shared`, only the answers to one prompt do.
    """

    def __init__(self, block_size: int, secret: bytes | None = None, *, is_shared: bool = True) -> None:
        self.block_size = block_size
        self._is_shared = is_shared
        self._secret = secret if secret is not None else secrets.token_bytes(32)

    def extend(self, request: Request, num_tokens: int) -> None:
        """Bring `request.block_hashes` up to the full blocks among its first `num_tokens` tokens."""
        hashes = request.block_hashes
        while (len(hashes) + 1) * self.block_size <= num_tokens:
            start = len(hashes) * self.block_size
            parent = hashes[-1] if hashes else self._root(request)
            hashes.append(self._hash_block(request, start, parent))

    def _root(self, request: Request) -> bytes:
        salt = request.source.cache_salt if self._is_shared else request.group
        return hashlib.sha256(self._secret + salt.encode()).digest()

    def _hash_block(self, request: Request, start: int, parent: bytes) -> bytes:
        end = start + self.block_size
        digest = hashlib.sha256(parent)
        digest.update(array("I", request.token_ids[start:end]).tobytes())
        for tile, placeholder in zip(request.source.tiles, request.source.placeholders, strict=True):
            if placeholder.offset >= end:
                break
            if placeholder.end > start:
                digest.update((placeholder.offset - start).to_bytes(8, "little", signed=True))
                digest.update(tile.key)
        return digest.digest()
