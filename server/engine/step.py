"""What the scheduler and the model runner say to each other: one dataclass each way, plain data only.

Policy speaks integers and lists; the runner turns them into tensors. Nothing here knows about devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from server.types import EngineRequest, PlaceholderRange, SamplingParams, Tile, TokenLogprobs


@dataclass(frozen=True, slots=True)
class NewRequest:
    """All that the runner keeps of a request from its first step to its last.

    `masked_token_ids` are those that end the answer; the sampler hides them until `min_tokens` are out. Under
    `ignore_eos` the `eos_token_ids` are not among them.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    masked_token_ids: tuple[int, ...]
    eos_token_ids: tuple[int, ...]
    tiles: tuple[Tile, ...]
    placeholders: tuple[PlaceholderRange, ...]


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """Compute `num_tokens` tokens of a request from `num_computed_tokens` on.

    `new_block_ids` extend the block table, or replace it when `resumed` (first step, or first after a preemption).
    `tile_slots` maps each tile that the chunk touches to the row of the encoder slab that holds it.
    """

    request_id: str
    num_computed_tokens: int
    num_tokens: int
    new_block_ids: list[int]
    resumed: bool
    tile_slots: dict[int, int]


@dataclass(frozen=True, slots=True)
class TileToEncode:
    """Encode tile `index` of a request, as far as `until`, before the forward pass; at 1 its rows go into `slot`.

    Shares of one tile come in consecutive steps, and no other tile is begun and left unfinished between them. `key` is
    what the slot is found by.
    """

    request_id: str
    index: int
    slot: int
    key: bytes
    until: float = 1.0

    @property
    def is_last_share(self) -> bool:
        return self.until >= 1.0


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step's work. `scheduled` holds single-token requests first; `finished` may be forgotten."""

    scheduled: list[ScheduledRequest]
    new_requests: list[NewRequest] = field(default_factory=list)
    tiles: list[TileToEncode] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)

    @property
    def request_ids(self) -> list[str]:
        """Whom it works for: those with a chunk, then those that wait for a tile."""
        chunks, tiles = (item.request_id for item in self.scheduled), (tile.request_id for tile in self.tiles)
        return list(dict.fromkeys([*chunks, *tiles]))


@dataclass(frozen=True, slots=True)
class ModelRunnerOutput:
    """`sampled` has a token for each request whose chunk reached its last token; `failed` names the culprits.

    A failed request has computed nothing this step, be it for a tile that it waits for; its message is safe to show to
    a client. `crashed` are those of
    them that raised or made numbers of no use, as a broken engine makes all do. Nor has a request in `deferred`
    computed anything, for lack of memory; it may succeed later. `failed_slots` are those whose tile could not be
    encoded, for either reason. `complete` are those whose grammar lets nothing follow the sampled token. `logprobs`
    tells of the sampled tokens, `prompt_logprobs` of the prompt tokens that a chunk's tokens predict: of tokens
    start + 1 to end of a chunk [start, end), as far as they are the prompt's; both where they were asked for.
    """

    sampled: dict[str, int]
    failed: dict[str, str] = field(default_factory=dict)
    crashed: frozenset[str] = frozenset()
    deferred: frozenset[str] = frozenset()
    failed_slots: frozenset[int] = frozenset()
    encode_seconds: float = 0.0
    complete: frozenset[str] = frozenset()
    logprobs: dict[str, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)


class StepExecutor(Protocol):
    """What the engine needs of a model runner."""

    def prepare(self, request: EngineRequest, done: Callable[[str | None], None]) -> None:
        """Begin to compile a request's grammar, and call `done` from any thread when its answers may be scheduled.

        `done` gets None, or a message for the client if they cannot be.
        """
        ...

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Run one step to its end. Raises EngineBrokenError when no later step can succeed."""
        ...

    def forget(self, request_ids: list[str]) -> None:
        """Drop all that is kept of requests that have ended, also of those that never had a step."""
        ...
