"""Small pieces that tests build engines from: requests, schedulers, and an executor that needs no model."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence

from server.engine.core import EngineCore, EngineInfo
from server.engine.limits import SchedulerLimits
from server.engine.scheduler import Scheduler
from server.engine.step import ModelRunnerOutput, NewRequest, ScheduledRequest, SchedulerOutput
from server.types import (
    ANYBODY,
    EngineRequest,
    PlaceholderRange,
    RequestOrigin,
    SamplingParams,
    Tile,
    TokenLogprobs,
)

IMAGE_ID, FAKE_ID = 32001, 32000
_ids = itertools.count()


def make_tile(name: str, num_pixels: int = 1) -> Tile:
    """A tile whose key follows from its name; its pixels are a stand-in."""
    return Tile(key=hashlib.sha256(name.encode()).digest(), height=1, width=num_pixels, pixels=bytes(3 * num_pixels))


def make_request(
    prompt: Sequence[int] | int = 8,
    *,
    request_id: str | None = None,
    tiles: Sequence[str] = (),
    rows_per_tile: int = 4,
    num_pixels: int = 1,
    max_tokens: int = 4,
    priority: int = 0,
    cache_salt: str = "",
    origin: RequestOrigin = ANYBODY,
    eos: tuple[int, ...] = (2,),
    n: int = 1,
    **sampling: object,
) -> EngineRequest:
    """A request of `prompt` text tokens (ids, or how many), with the named tiles in a row after the first token.

    Each tile is of `num_pixels`.
    It is greedy unless `n` answers are wanted.
    """
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
        sampling=SamplingParams(max_tokens=max_tokens, temperature=float(n > 1), **sampling),  # type: ignore[arg-type]
        eos_token_ids=eos,
        tiles=tuple(make_tile(name, num_pixels) for name in tiles),
        placeholders=tuple(placeholders),
        priority=priority,
        cache_salt=cache_salt,
        origin=origin,
        n=n,
    )


def make_limits(**changes: int | bool) -> SchedulerLimits:
    values: dict[str, int | bool] = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "max_num_batched_pixels": 1,
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

    Its cache remembers what was written where: a plan that counts on tokens or tiles that are not there is an error.
    `broken_tiles` (keys) fail to encode; `explode_on` (request ids) make the whole step raise;
    `completing` tokens complete a grammar; `prepared` holds what is to be called when a grammar is compiled.
    """

    def __init__(self, block_size: int = 4) -> None:
        self.block_size = block_size
        self.tokens: dict[str, list[int]] = {}
        self.blocks: dict[str, list[int]] = {}
        self.sources: dict[str, NewRequest] = {}
        self.slots: dict[int, bytes] = {}
        self.contents: dict[str, list[int]] = {}
        self.cache: dict[tuple[int, int], int] = {}  # (block, place in it) → what all tokens up to it are
        self.encoded: list[bytes] = []
        self.shares: list[tuple[bytes, float]] = []
        self.partial: tuple[int, bytes, float] | None = None
        self.steps: list[SchedulerOutput] = []
        self.broken_tiles: set[bytes] = set()
        self.explode_on: set[str] = set()
        self.completing: set[int] = set()
        self.prepared: dict[str, Callable[[str | None], None]] = {}

    def prepare(self, request: EngineRequest, done: Callable[[str | None], None]) -> None:
        self.prepared[request.request_id] = done

    def forget(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.prepared.pop(request_id, None)
            for kept in (self.tokens, self.sources, self.contents, self.blocks):
                kept.pop(request_id, None)  # one that was held may never have had a step

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        self.steps.append(step)
        self.forget(step.finished)
        for new in step.new_requests:
            self.tokens[new.request_id] = list(new.prompt_token_ids)
            self.sources[new.request_id] = new
            self.contents[new.request_id] = []
        lengths = [plan.num_tokens for plan in step.scheduled]
        if min(lengths, default=1) < 1 or sorted(lengths, key=lambda length: length > 1) != lengths:
            raise AssertionError("chunks must have tokens, and single tokens come first")
        if any(plan.request_id in self.explode_on for plan in step.scheduled):
            raise RuntimeError("injected")
        broken = self._encode(step)
        failed = {item.request_id: "broken tile" for item in step.tiles if item.slot in broken}
        sampled, prompt_logprobs = {}, {}
        for plan in step.scheduled:
            blocks = [] if plan.resumed else self.blocks[plan.request_id]
            self.blocks[plan.request_id] = blocks + plan.new_block_ids
            if not broken.isdisjoint(plan.tile_slots.values()):
                failed[plan.request_id] = "broken tile"
            if plan.request_id in failed:
                continue
            self._compute(plan)
            if self.sources[plan.request_id].sampling.num_prompt_logprobs is not None:
                prompt_logprobs[plan.request_id] = self._prompt_logprobs(plan)
            if plan.num_computed_tokens + plan.num_tokens == len(self.tokens[plan.request_id]):
                token = self.next_token(self.tokens[plan.request_id])
                self.tokens[plan.request_id].append(token)
                sampled[plan.request_id] = token
        return ModelRunnerOutput(
            sampled=sampled,
            failed=failed,
            failed_slots=frozenset(broken),
            complete=frozenset(name for name, token in sampled.items() if token in self.completing),
            logprobs={
                name: TokenLogprobs(token, -0.5)
                for name, token in sampled.items()
                if self.sources[name].sampling.num_logprobs is not None
            },
            prompt_logprobs=prompt_logprobs,
        )

    def _prompt_logprobs(self, plan: ScheduledRequest) -> list[TokenLogprobs]:
        """Of a prompt token at position p, -p."""
        prompt = self.sources[plan.request_id].prompt_token_ids
        start, end = plan.num_computed_tokens, plan.num_computed_tokens + plan.num_tokens
        return [TokenLogprobs(prompt[p], -float(p)) for p in range(start + 1, min(end + 1, len(prompt)))]

    def _encode(self, step: SchedulerOutput) -> set[int]:
        """Fill slots with tiles that end; one whose tile is broken keeps what it held. Returns those."""
        if len({item.slot for item in step.tiles}) != len(step.tiles):
            raise AssertionError("two tiles for one slot")
        if sum(not item.is_last_share for item in step.tiles) > 1:
            raise AssertionError("two tiles in part")
        partial, self.partial = self.partial, None
        broken = set()
        for item in step.tiles:
            key = self.sources[item.request_id].tiles[item.index].key
            begun = partial[2] if partial is not None and partial[:2] == (item.slot, key) else 0.0
            if not 0 < item.until <= 1:
                raise AssertionError("a tile does not advance")
            self.shares.append((key, item.until))
            if item.is_last_share:
                self.encoded.append(key)
            if key in self.broken_tiles:
                broken.add(item.slot)
            elif item.is_last_share:
                self.slots[item.slot] = key
            else:
                self.partial = (item.slot, key, max(begun, item.until))  # one begun anew may be further already
        return broken

    def _compute(self, plan: ScheduledRequest) -> None:
        source, blocks = self.sources[plan.request_id], self.blocks[plan.request_id]
        start, end = plan.num_computed_tokens, plan.num_computed_tokens + plan.num_tokens
        if len(blocks) * self.block_size < end:
            raise AssertionError("fewer blocks than tokens")
        touched = {i for i, place in enumerate(source.placeholders) if place.offset < end and place.end > start}
        if touched != set(plan.tile_slots):
            raise AssertionError("slots are not exactly those of the tiles that the chunk touches")
        for index in touched:
            if self.slots.get(plan.tile_slots[index]) != source.tiles[index].key:
                raise AssertionError("a slot holds another tile than the one it was given for")
        contents = self._contents(plan.request_id)
        for position in range(0 if plan.resumed else max(start - 1, 0), end):
            place = (blocks[position // self.block_size], position % self.block_size)
            if position >= start:
                self.cache[place] = contents[position]
            elif self.cache.get(place) != contents[position]:
                raise AssertionError("a block holds other tokens or pictures than those it was taken for")

    def _contents(self, request_id: str) -> list[int]:
        """For each token a number that stands for it, its picture, and all before it."""
        source, known = self.sources[request_id], self.contents[request_id]
        tokens = self.tokens[request_id]
        while len(known) < len(tokens):
            position = len(known)
            picture = [
                (tile.key, position - place.offset)
                for tile, place in zip(source.tiles, source.placeholders, strict=True)
                if place.offset <= position < place.end
            ]
            known.append(hash((known[-1] if known else 0, tokens[position], *picture)))
        return known

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
