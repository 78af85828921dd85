"""A request inside the engine: its tokens, how far they are computed, and what it holds.

Knows nothing of text, pixels or devices; whoever takes a block or a slot for it records that here.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

from server.types import EngineRequest, FinishReason


class RequestStatus(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Request:
    """Mutable twin of an EngineRequest.

    There is no prefill or decode phase: `num_computed_tokens` catches up with `num_tokens`, one chunk a step.

    token_ids            prompt and answer so far
    block_ids            KV blocks, in token order; block i holds tokens [i * block_size, (i + 1) * block_size)
    block_hashes         prefix hashes of the full blocks hashed so far (may run ahead of `block_ids`)
    tile_slots           encoder slots pinned for tiles that are still needed: {tile index: slot}
    order                arrival number: ties between equal priorities go to the smaller one
    """

    __slots__ = (
        "block_hashes",
        "block_ids",
        "finish_reason",
        "first_scheduled_time",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_published_blocks",
        "order",
        "source",
        "status",
        "tile_slots",
        "token_ids",
    )

    def __init__(self, source: EngineRequest, order: int) -> None:
        """Raises ValueError unless each tile has a place of its own in the prompt."""
        _check_placeholders(source)
        self.source = source
        self.order = order
        self.token_ids: list[int] = list(source.prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []
        self.num_published_blocks = 0
        self.tile_slots: dict[int, int] = {}
        self.status = RequestStatus.WAITING
        self.finish_reason: FinishReason | None = None
        self.first_scheduled_time: float | None = None

    @property
    def request_id(self) -> str:
        return self.source.request_id

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.source.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.source.prompt_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller runs earlier and is preempted later."""
        return (self.source.priority, self.order)

    def tiles_between(self, start: int, end: int) -> Iterator[int]:
        """Indices of the tiles with a row in the tokens [start, end)."""
        for index, placeholder in enumerate(self.source.placeholders):
            if placeholder.offset >= end:
                return
            if placeholder.end > start:
                yield index

    def append(self, token_id: int) -> None:
        """Take a sampled token and decide whether it is the last."""
        self.token_ids.append(token_id)
        sampling = self.source.sampling
        is_eos = token_id in self.source.eos_token_ids and not sampling.ignore_eos
        if is_eos or token_id in sampling.stop_token_ids:
            self.finish_reason = FinishReason.STOP
        elif self.num_output_tokens >= self.source.max_tokens:
            self.finish_reason = FinishReason.LENGTH

    @property
    def stop_token_id(self) -> int | None:
        """The id that ended the answer, if one did."""
        return self.token_ids[-1] if self.finish_reason is FinishReason.STOP else None


def _check_placeholders(source: EngineRequest) -> None:
    """Raise ValueError unless each tile has a place of its own in the prompt, in order."""
    if len(source.tiles) != len(source.placeholders):
        raise ValueError(f"{len(source.tiles)} tiles do not fit {len(source.placeholders)} placeholders")
    end = 0
    for placeholder in source.placeholders:
        if placeholder.length < 1 or placeholder.offset < end:
            raise ValueError("placeholders must ascend and not overlap")
        end = placeholder.end
    if end > len(source.prompt_token_ids):
        raise ValueError(f"placeholders up to {end} do not fit {len(source.prompt_token_ids)} prompt tokens")
