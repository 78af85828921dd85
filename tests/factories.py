"""Small pieces that tests build engines from: requests, schedulers, and an executor that needs no model."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Sequence

from server.engine.core import EngineCore, EngineInfo
from server.engine.scheduler import Scheduler, SchedulerLimits
from server.engine.step import ModelRunnerOutput, NewRequest, SchedulerOutput
from server.types import EngineRequest, PlaceholderRange, SamplingParams, Tile

IMAGE_ID, FAKE_ID = 32001, 32000
_ids = itertools.count()


def make_tile(name: str) -> Tile:
    """A tile whose key follows from its name; its pixels are a stand-in."""
    return Tile(key=hashlib.sha256(name.encode()).digest(), height=1, width=1, pixels=b"\0\0\0")


def make_request(
    prompt: Sequence[int] | int = 8,
    *,
    request_id: str | None = None,
    tiles: Sequence[str] = (),
    rows_per_tile: int = 4,
    max_tokens: int = 4,
    priority: int = 0,
    cache_salt: str = "",
    eos: tuple[int, ...] = (2,),
    **sampling: object,
) -> EngineRequest:
    """A request of `prompt` text tokens (ids, or how many), with the named tiles in a row after the first token."""
    text = list(range(100, 100 + prompt)) if isinstance(prompt, int) else list(prompt)
    ids, placeholders = text[:1], []
    for _ in tiles:
        if ids[-1] != FAKE_ID:
            ids.append(FAKE_ID)
        placeholders.append(PlaceholderRange(len(ids), rows_per_tile))
        ids += [IMAGE_ID] * rows_per_tile + [FAKE_ID]
    ids += text[1:]
    return EngineRequest(
        request_id=request_id or f"r{next(_ids)}",
        prompt_token_ids=ids,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, **sampling),  # type: ignore[arg-type]
        eos_token_ids=eos,
        tiles=tuple(make_tile(name) for name in tiles),
        placeholders=tuple(placeholders),
        priority=priority,
        cache_salt=cache_salt,
    )


def make_limits(**changes: int | bool) -> SchedulerLimits:
    values: dict[str, int | bool] = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "max_num_batched_tiles": 1,
        "max_model_len": 128,
        "block_size": 4,
        "num_blocks": 64,
        "num_tile_slots": 8,
        "enable_prefix_caching": True,
    }
    return SchedulerLimits(**{**values, **changes})  # type: ignore[arg-type]


def make_scheduler(**changes: int | bool) -> Scheduler:
    return Scheduler(make_limits(**changes))


class FakeExecutor:
    """Checks every plan as a strict runner would, and samples a token that depends on all tokens before it.

    `broken_tiles` (keys) fail to encode; `explode_on` (request ids) make the whole step raise.
    """

    def __init__(self, block_size: int = 4) -> None:
        self.block_size = block_size
        self.tokens: dict[str, list[int]] = {}
        self.blocks: dict[str, list[int]] = {}
        self.sources: dict[str, NewRequest] = {}
        self.slots: dict[int, bytes] = {}
        self.encoded: list[bytes] = []
        self.steps: list[SchedulerOutput] = []
        self.broken_tiles: set[bytes] = set()
        self.explode_on: set[str] = set()

    def forget(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            del self.tokens[request_id], self.sources[request_id]
            self.blocks.pop(request_id, None)

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        self.steps.append(step)
        self.forget(step.finished)
        for new in step.new_requests:
            self.tokens[new.request_id] = list(new.prompt_token_ids)
            self.sources[new.request_id] = new
        broken = set()
        for item in step.tiles:
            key = self.sources[item.request_id].tiles[item.index].key
            self.encoded.append(key)
            self.slots[item.slot] = key
            if key in self.broken_tiles:
                broken.add(item.slot)
        sampled, failed = {}, {}
        for plan in step.scheduled:
            if plan.request_id in self.explode_on:
                raise RuntimeError("injected")
            blocks = [] if plan.resumed else self.blocks[plan.request_id]
            self.blocks[plan.request_id] = blocks + plan.new_block_ids
            end = plan.num_computed_tokens + plan.num_tokens
            if len(self.blocks[plan.request_id]) * self.block_size < end:
                raise AssertionError("fewer blocks than tokens")
            source = self.sources[plan.request_id]
            for index, placeholder in enumerate(source.placeholders):
                if placeholder.offset < end and placeholder.end > plan.num_computed_tokens:
                    if self.slots[plan.tile_slots[index]] != source.tiles[index].key:
                        raise AssertionError("a slot holds another tile than the one it was given for")
                    if plan.tile_slots[index] in broken:
                        failed[plan.request_id] = "broken tile"
            if plan.request_id not in failed and end == len(self.tokens[plan.request_id]):
                token = self.next_token(self.tokens[plan.request_id])
                self.tokens[plan.request_id].append(token)
                sampled[plan.request_id] = token
        return ModelRunnerOutput(sampled=sampled, failed=failed)

    @staticmethod
    def next_token(tokens: Sequence[int]) -> int:
        return 1000 + int.from_bytes(hashlib.sha256(repr(list(tokens)).encode()).digest()[:2], "little")


def make_core(**changes: int | bool) -> EngineCore:
    """An engine without a model; importable, so that a process can build it too."""
    limits = make_limits(**changes)
    info = EngineInfo(
        max_model_len=limits.max_model_len,
        num_blocks=limits.num_blocks,
        block_size=limits.block_size,
        num_tile_slots=limits.num_tile_slots,
        device="cpu",
        dtype="float32",
        num_parameters=0,
        load_seconds=0.0,
    )
    return EngineCore(Scheduler(limits), FakeExecutor(limits.block_size), info)


core_factory = functools.partial(make_core)


def expected_answer(request: EngineRequest) -> list[int]:
    """What FakeExecutor answers to a request that is alone."""
    tokens = list(request.prompt_token_ids)
    while len(tokens) - len(request.prompt_token_ids) < request.max_tokens:
        tokens.append(FakeExecutor.next_token(tokens))
    return tokens[len(request.prompt_token_ids) :]
