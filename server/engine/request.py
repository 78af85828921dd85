"""A request inside the engine: its tokens, how far they are computed, and what it holds.

Knows nothing of text, pixels or devices; whoever takes a block or a slot for it records that here.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from collections.abc import Iterator

import msgspec

from server.types import EngineRequest, FinishReason


class RequestStatus(enum.Enum):
    HELD = enum.auto()
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
    group                id of the request whose prompt this is: the same for all its answers
    num_prompt_logprobs  how many of the prompt's log-probabilities have been handed out
    num_deferrals        how often it had no memory since its last token
    is_resumed           whether its next chunk is the first since it was started, or started again
    """

    __slots__ = (
        "block_hashes",
        "block_ids",
        "finish_reason",
        "first_scheduled_time",
        "group",
        "is_resumed",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_deferrals",
        "num_preemptions",
        "num_prompt_logprobs",
        "num_published_blocks",
        "order",
        "source",
        "status",
        "tile_slots",
        "token_ids",
    )

    def __init__(self, source: EngineRequest, order: int, *, group: str | None = None) -> None:
        """Raises ValueError unless each tile has a place of its own in the prompt."""
        _check_placeholders(source)
        self.source = source
        self.order = order
        self.group = source.request_id if group is None else group
        self.token_ids: list[int] = list(source.prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_prompt_logprobs = 0
        self.num_deferrals = 0
        self.is_resumed = True
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
    def key(self) -> str:
        """Whose request it is."""
        return self.source.origin.key

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

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether every prompt token has to be computed here, because its log-probabilities are wanted."""
        wanted = self.source.sampling.num_prompt_logprobs is not None
        return wanted and self.num_prompt_logprobs < self.num_prompt_tokens - 1

    def tiles_between(self, start: int, end: int) -> Iterator[int]:
        """Indices of the tiles with a row in the tokens [start, end)."""
        for index, placeholder in enumerate(self.source.placeholders):
            if placeholder.offset >= end:
                return
            if placeholder.end > start:
                yield index

    def append(self, token_id: int, *, is_complete: bool = False) -> None:
        """Take a sampled token and decide whether it is the last. `is_complete`: its grammar lets nothing follow."""
        self.token_ids.append(token_id)
        sampling = self.source.sampling
        is_eos = token_id in self.source.eos_token_ids and not sampling.ignore_eos
        if is_eos or is_complete or token_id in sampling.stop_token_ids:
            self.finish_reason = FinishReason.STOP
        elif self.num_output_tokens >= self.source.max_tokens:
            self.finish_reason = FinishReason.LENGTH

    @property
    def stop_token_id(self) -> int | None:
        """The id that ended the answer, if one did: the last one may also have completed a grammar."""
        if self.finish_reason is not FinishReason.STOP:
            return None
        last = self.token_ids[-1]
        return last if last in self.source.eos_token_ids or last in self.source.sampling.stop_token_ids else None


def split_choices(source: EngineRequest) -> list[EngineRequest]:
    """A request for each answer that is to be computed; the first keeps the request's id and seed."""
    choices = [source]
    for index, choice_id in enumerate(source.choice_ids[1:], start=1):
        seed = source.sampling.seed
        sampling = msgspec.structs.replace(
            source.sampling,
            seed=None if seed is None else _choice_seed(seed, index),
            num_prompt_logprobs=None,  # the first tells them
        )
        choices.append(msgspec.structs.replace(source, request_id=choice_id, sampling=sampling))
    return choices


def _choice_seed(seed: int, index: int) -> int:
    """Noise of its own for each answer, fixed by the request's seed."""
    digest = hashlib.blake2b(struct.pack("<qq", seed, index), digest_size=8, person=b"choice").digest()
    return int.from_bytes(digest, "little", signed=True)


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
