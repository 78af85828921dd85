"""A server whose engine computes nothing: every running request gets a word at a steady beat.

Scheduler, messages, process boundary and HTTP are the real ones, so it costs what everything but the model costs.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable

from server.config import ServerConfig
from server.engine.core import EngineCore, EngineInfo
from server.engine.limits import SchedulerLimits
from server.engine.scheduler import Scheduler
from server.engine.step import ModelRunnerOutput, SchedulerOutput
from server.launch import build_llm, run_server
from server.types import EngineRequest

BLOCK_SIZE = 16
CONTEXT = 4096
# Words of Mistral's vocabulary, as text has them: short ones, each its own token, and all ASCII.
FIRST_WORD, NUM_WORDS = 264, 600


class CannedExecutor:
    """Answers each step `step_seconds` after the one before, or at once where that has passed."""

    def __init__(self, step_seconds: float) -> None:
        self._step_seconds = step_seconds
        self._next = time.monotonic()
        self._lengths: dict[str, int] = {}
        self._words = itertools.cycle(range(FIRST_WORD, FIRST_WORD + NUM_WORDS))

    def prepare(self, request: EngineRequest, done: Callable[[str | None], None]) -> None:
        done(None)

    def forget(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._lengths.pop(request_id, None)

    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        self.forget(step.finished)
        for new in step.new_requests:
            self._lengths[new.request_id] = len(new.prompt_token_ids)
        sampled = {}
        for item in step.scheduled:
            if item.num_computed_tokens + item.num_tokens == self._lengths[item.request_id]:
                self._lengths[item.request_id] += 1
                sampled[item.request_id] = next(self._words)
        now = time.monotonic()
        self._next = max(self._next + self._step_seconds, now)
        time.sleep(self._next - now)
        return ModelRunnerOutput(sampled=sampled)


def build_canned_core(step_seconds: float, max_num_seqs: int) -> EngineCore:
    num_blocks = max_num_seqs * CONTEXT // BLOCK_SIZE
    limits = SchedulerLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=1 << 16,
        max_num_batched_pixels=64 * 980 * 980,
        max_model_len=CONTEXT,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        num_tile_slots=64,
        enable_prefix_caching=True,
    )
    info = EngineInfo(
        max_model_len=CONTEXT,
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        num_tile_slots=64,
        device="none",
        dtype="none",
        num_parameters=0,
        load_seconds=0.0,
    )
    return EngineCore(Scheduler(limits), CannedExecutor(step_seconds), info)


def serve_canned(*, port: int, step_seconds: float, max_num_seqs: int) -> int:
    """Serve until SIGTERM, with the bundled demo's tokenizer."""
    config = ServerConfig.model_validate({"port": port, "max_num_seqs": max_num_seqs})
    factory = functools.partial(build_canned_core, step_seconds, max_num_seqs)
    return run_server(config, build_llm(config, factory=factory))
