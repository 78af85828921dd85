"""The first steps of an engine, before anybody waits for one: what is made on first use is made, and is timed.

Through a scheduler of its own, so that nothing of it is found again. Knows plans and sizes, not tensors.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from server.engine.limits import SchedulerLimits
from server.engine.scheduler import Scheduler
from server.engine.step import StepExecutor
from server.errors import ConfigError
from server.types import EngineRequest, PlaceholderRange, SamplingParams, Tile

NUM_DECODES = 4
SHORT_PROMPT = 8
# Each sort of sampling once, and more than one answer a step.
_SAMPLINGS = (
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 0, "top_p": 0.9, "num_logprobs": 1, "num_prompt_logprobs": 1},
    {"temperature": 1.0, "top_k": 10, "min_p": 0.01, "logit_bias": {5: 1.0}},
    {"temperature": 0.7, "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1, "min_tokens": 2},
)


def warm_up(limits: SchedulerLimits, executor: StepExecutor, *, tile_edge: int, rows_per_tile: int) -> float:
    """Run the largest step of text and tiles, then small ones. Returns the longest one's seconds.

    `tile_edge` is the largest tile's, in pixels. Raises ConfigError where a step fails: real ones would too.
    """
    scheduler = Scheduler(limits)
    scheduler.add(_largest_request(limits, tile_edge=tile_edge, rows_per_tile=rows_per_tile))
    for request in _small_requests(limits):
        scheduler.add(request)
    longest = 0.0
    while scheduler.has_work:
        longest = max(longest, _step(scheduler, executor))
    executor.forget(scheduler.take_finished())
    return longest


def _step(scheduler: Scheduler, executor: StepExecutor) -> float:
    plan = scheduler.schedule()
    size = f"{sum(item.num_tokens for item in plan.scheduled)} tokens and {len(plan.tiles)} tiles"
    started = time.perf_counter()
    try:
        result = executor.execute(plan)
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ConfigError(f"warm-up: a step of {size} failed: {cause}") from error
    seconds = time.perf_counter() - started
    if result.deferred:
        raise ConfigError(f"warm-up: there is no memory for a step of {size}")
    for output in scheduler.update(plan, result):
        if output.error is not None:
            raise ConfigError(f"warm-up: a step of {size} failed: {output.error}")
    return seconds


def _largest_request(limits: SchedulerLimits, *, tile_edge: int, rows_per_tile: int) -> EngineRequest:
    """As many tokens and tiles as a step takes, the tiles last: one that is too large for a step ends its chunk."""
    num_tokens = max(min(limits.max_num_batched_tokens, limits.max_model_len - NUM_DECODES), 1)
    num_tiles = max(limits.max_num_batched_pixels // tile_edge**2, 1)
    num_tiles = min(num_tiles, limits.num_tile_slots, (num_tokens - 1) // rows_per_tile)
    first = num_tokens - 1 - num_tiles * rows_per_tile
    pixels = bytes(tile_edge * tile_edge * 3)
    return EngineRequest(
        request_id="warm-up",
        prompt_token_ids=_some_ids(num_tokens),
        sampling=SamplingParams(max_tokens=NUM_DECODES, temperature=0.0, ignore_eos=True),
        eos_token_ids=(),
        tiles=tuple(Tile(b"warm-up %d" % index, tile_edge, tile_edge, pixels) for index in range(num_tiles)),
        placeholders=tuple(
            PlaceholderRange(first + index * rows_per_tile, rows_per_tile) for index in range(num_tiles)
        ),
    )


def _small_requests(limits: SchedulerLimits) -> Iterator[EngineRequest]:
    if limits.max_model_len < SHORT_PROMPT + NUM_DECODES:
        return
    for index, sampling in enumerate(_SAMPLINGS):
        yield EngineRequest(
            request_id=f"warm-up {index}",
            prompt_token_ids=_some_ids(SHORT_PROMPT),
            sampling=SamplingParams(max_tokens=NUM_DECODES, ignore_eos=True, **sampling),  # type: ignore[arg-type]
            eos_token_ids=(),
        )


def _some_ids(count: int) -> list[int]:
    """Ids that every vocabulary has."""
    return [index % 100 for index in range(count)]
