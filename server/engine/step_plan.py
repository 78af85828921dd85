"""A step while it is put together: its chunks, the tiles that they need, and what is left of its budgets.

Has tiles encoded and pins them, in the encoder cache and on the request; takes no blocks and decides nothing about who
runs.
"""

from __future__ import annotations

from server.engine.counts import Counts
from server.engine.encoder_cache import EncoderCache
from server.engine.limits import SchedulerLimits
from server.engine.request import Request
from server.engine.step import NewRequest, ScheduledRequest, SchedulerOutput, TileToEncode


class StepPlan:
    """Goes on with the partial tile first, whoever it is for: no other can begin before it is whole."""

    def __init__(self, limits: SchedulerLimits, encoder: EncoderCache, counts: Counts) -> None:
        self.tokens_left = limits.max_num_batched_tokens
        self.has_preempted = False
        self._pixels_left = limits.max_num_batched_pixels
        self._encoder = encoder
        self._counts = counts
        self._scheduled: dict[str, ScheduledRequest] = {}
        self._tiles: list[TileToEncode] = []
        self._new: list[NewRequest] = []
        self._encode()

    def reach(self, request: Request, start: int, num_tokens: int) -> int:
        """How many tokens a chunk from `start` may have before a tile that neither budget nor slots allow yet.

        Pins the tiles of that chunk, and has those that are not here encoded.
        """
        touched = list(request.tiles_between(start, start + num_tokens))
        for index in touched:  # lest a new tile takes the slot of one that this very chunk needs
            self._encoder.touch(request.source.tiles[index].key)
        for index in touched:
            if index not in request.tile_slots and not self._pin(request, index):
                return max(request.source.placeholders[index].offset - start, 0)
        return num_tokens

    def _pin(self, request: Request, index: int) -> bool:
        """Pin a tile that is here, or is by the end of this step's encoding."""
        tile = request.source.tiles[index]
        is_hit = tile.key in self._encoder
        if not is_hit:
            if self._pixels_left == 0:  # as always while a tile is partial
                return False
            if not self._encoder.begin(request.request_id, index, tile.key, tile.height * tile.width):
                return False
            self._encode()
            if tile.key not in self._encoder:
                return False
        request.tile_slots[index] = self._encoder.pin(tile.key)
        self._counts.tile_queries += 1
        self._counts.tile_hits += is_hit
        return True

    def _encode(self) -> None:
        """Spend what is left of the budget on the partial tile."""
        partial = self._encoder.partial
        if partial is None:
            return
        share = min(self._pixels_left, partial.num_pixels - partial.num_done)
        self._pixels_left -= share
        until = (partial.num_done + share) / partial.num_pixels
        self._tiles.append(TileToEncode(partial.request_id, partial.index, partial.slot, partial.key, until))
        self._encoder.advance(share)

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

    def add(self, request: Request, num_tokens: int, added: list[int]) -> None:
        """Enter a chunk within `reach` for which blocks have been `added`, and charge the budget."""
        start = request.num_computed_tokens
        self.tokens_left -= num_tokens
        self._scheduled[request.request_id] = ScheduledRequest(
            request_id=request.request_id,
            num_computed_tokens=start,
            num_tokens=num_tokens,
            new_block_ids=list(request.block_ids) if request.is_resumed else added,
            resumed=request.is_resumed,
            tile_slots={index: request.tile_slots[index] for index in request.tiles_between(start, start + num_tokens)},
        )
        request.is_resumed = False

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
