"""A step while it is put together: its chunks, the tiles that they need, and what is left of its budgets.

Pins tiles, in the encoder cache and on the request; takes no blocks and decides nothing about who runs.
"""

from __future__ import annotations

from server.engine.counts import Counts
from server.engine.encoder_cache import EncoderCache
from server.engine.limits import SchedulerLimits
from server.engine.request import Request
from server.engine.step import NewRequest, ScheduledRequest, SchedulerOutput, TileToEncode


class StepPlan:
    def __init__(self, limits: SchedulerLimits, encoder: EncoderCache, counts: Counts) -> None:
        self.tokens_left = limits.max_num_batched_tokens
        self.has_preempted = False
        self._tiles_left = limits.max_num_batched_tiles
        self._encoder = encoder
        self._counts = counts
        self._scheduled: dict[str, ScheduledRequest] = {}
        self._tiles: list[TileToEncode] = []
        self._new: list[NewRequest] = []

    def reachable(self, request: Request, start: int, num_tokens: int) -> int:
        """How far a chunk from `start` may go before a tile that neither budget nor slots allow. Takes nothing."""
        tiles_left = self._tiles_left
        available = self._encoder.num_available
        seen: set[bytes] = set()
        for index in request.tiles_between(start, start + num_tokens):
            key = request.source.tiles[index].key
            if index in request.tile_slots or key in seen or self._encoder.is_pinned(key):
                continue
            must_encode = key not in self._encoder
            if available == 0 or (must_encode and tiles_left == 0):
                return max(request.source.placeholders[index].offset - start, 0)
            available -= 1
            tiles_left -= must_encode
            seen.add(key)
        return num_tokens

    def introduce(self, request: Request) -> None:
        """Have the runner told of a request that has its first step."""
        source = request.source
        eos = () if source.sampling.ignore_eos else source.eos_token_ids
        self._new.append(
            NewRequest(
                request_id=source.request_id,
                prompt_token_ids=source.prompt_token_ids,
                sampling=source.sampling,
                masked_token_ids=tuple({*eos, *source.sampling.stop_token_ids}),
                eos_token_ids=source.eos_token_ids,
                tiles=source.tiles,
                placeholders=source.placeholders,
            )
        )

    def add(self, request: Request, num_tokens: int, blocks: list[int], *, resumed: bool) -> None:
        """Enter a chunk that is `reachable` and whose blocks are taken: pin its tiles and charge the budgets."""
        start = request.num_computed_tokens
        touched = list(request.tiles_between(start, start + num_tokens))
        # Tiles that are there first, lest a new one takes the slot of one that this very chunk needs.
        for index in sorted(touched, key=lambda index: request.source.tiles[index].key not in self._encoder):
            if index not in request.tile_slots:
                self._pin_tile(request, index)
        self.tokens_left -= num_tokens
        self._scheduled[request.request_id] = ScheduledRequest(
            request_id=request.request_id,
            num_computed_tokens=start,
            num_tokens=num_tokens,
            new_block_ids=blocks,
            resumed=resumed,
            tile_slots={index: request.tile_slots[index] for index in touched},
        )

    def _pin_tile(self, request: Request, index: int) -> None:
        key = request.source.tiles[index].key
        must_encode = key not in self._encoder
        slot = self._encoder.pin(key)
        if slot is None:
            raise RuntimeError("a tile slot vanished between planning and pinning")
        request.tile_slots[index] = slot
        self._counts.tile_queries += 1
        if must_encode:
            self._tiles_left -= 1
            self._tiles.append(TileToEncode(request.request_id, index, slot, key))
        else:
            self._counts.tile_hits += 1

    def withdraw(self, request: Request) -> None:
        """Take a preempted request's chunk out, if it has one.

        Tiles planned for it this step are still encoded: others may have pinned them meanwhile.
        """
        planned = self._scheduled.pop(request.request_id, None)
        if planned is not None:
            self.tokens_left += planned.num_tokens
        self.has_preempted = True

    def build(self, finished: list[str]) -> SchedulerOutput:
        # Single tokens first, as the runner wants them; a resumed request may also have just one left.
        scheduled = sorted(self._scheduled.values(), key=lambda item: item.num_tokens > 1)
        # A slot that a preemption freed may have been taken again: only its last content counts.
        tiles = list({tile.slot: tile for tile in self._tiles}.values())
        return SchedulerOutput(scheduled=scheduled, new_requests=self._new, tiles=tiles, finished=finished)
