"""Faults in a real runner, put in where a library's exception would come from: a layer's forward, or the sampler.

Also a server process whose memory runs out on command: `python -m tests.runner.faults serve …` has none while the file
exists that FAULT_FILE names.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from server.config import ServerConfig
from server.engine.core import EngineCore
from server.engine.limits import SchedulerLimits
from server.engine.scheduler import Scheduler
from server.engine.step import ModelRunnerOutput, SchedulerOutput
from server.model.attention.base import LayerCache
from server.runner.input_batch import RequestState
from server.runner.model_runner import ModelRunner
from server.runner.sampler import Sampler
from server.runner.vision_runner import VisionRunner
from server.types import EngineOutput, EngineRequest, TokenLogprobs
from tests.engines import real_core

POISON = 777
SMALL = {"max_model_len": 1024, "kv_cache_memory_gb": 0.01, "max_num_batched_tokens": 512, "encoder_cache_tiles": 8}
FAULT_FILE = "FAULT_FILE"
MOST_STEPS = 50  # for a request


@functools.cache
def _built(folder: Path) -> EngineCore:
    return real_core(folder, **SMALL)


def make_core(
    folder: Path, scheduler_type: Callable[[SchedulerLimits], Scheduler] = Scheduler, **limits: int | bool
) -> EngineCore:
    """An engine in which nothing has happened yet. All share one model, and a new one takes the faults of the last.

    `limits` are the scheduler's, which may be less than the caches have room for.
    """
    core = _built(folder)
    built = runner_of(core)
    model, slab = built._model, built._vision.slab
    for module in model.modules():
        module._forward_pre_hooks.clear()
    runner = ModelRunner(
        model,
        attention=built._attention,
        caches=[LayerCache(torch.zeros_like(cache.key), torch.zeros_like(cache.value)) for cache in built._caches],
        vision=VisionRunner(
            model, num_slots=slab.shape[0], rows_per_tile=slab.shape[1], hidden=slab.shape[2], device=built._device
        ),
        sampler=built._sampler,
        grammars=built._grammars,
        device=built._device,
    )
    scheduler = scheduler_type(dataclasses.replace(core.scheduler.limits, **limits))  # type: ignore[arg-type]
    return EngineCore(scheduler, runner, core.info)


def runner_of(core: EngineCore) -> ModelRunner:
    assert isinstance(core.executor, ModelRunner)
    return core.executor


def run_out_of_memory() -> None:
    """As a layer does that asks for more than there is."""
    torch.empty(1 << 50)


def break_device() -> None:
    raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nSearch for it in the manual.")


def at_each_run(core: EngineCore, fault: Callable[[list[int]], None]) -> list[int]:
    """Have `fault` called with the token ids of each forward pass. Returns their numbers, as they come."""
    sizes: list[int] = []

    def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ids = inputs[0].tolist()
        sizes.append(len(ids))
        fault(ids)

    runner_of(core)._model.text.embedding.register_forward_pre_hook(hook)
    return sizes


def at_each_encoding(core: EngineCore, fault: Callable[[Tensor], None]) -> None:
    """Have `fault` called with the pixels [N, 3, H, W] of each pass of the vision tower."""
    runner_of(core)._model.vision.patches.register_forward_pre_hook(lambda _module, inputs: fault(inputs[0]))


class FaultySampler(Sampler):
    """The sampler, with `fault` called for each batch's request ids once all of it has been sampled."""

    def __init__(self, core: EngineCore, fault: Callable[[list[str]], None]) -> None:
        runner = runner_of(core)
        super().__init__(runner._sampler.forbidden_token_ids, torch.device("cpu"))
        self._fault = fault
        runner._sampler = self

    def sample(self, logits: Tensor, states: Sequence[RequestState]) -> Tensor:
        tokens = super().sample(logits, states)
        self._fault([state.source.request_id for state in states])
        return tokens


class Told:
    """What an engine told of each answer, and what its runner said of each step."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.tokens: dict[str, list[int]] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        self.ends: dict[str, EngineOutput] = {}
        self.preemptions = 0
        self.steps: list[tuple[SchedulerOutput, ModelRunnerOutput]] = []
        self._execute = core.executor.execute
        core.executor.execute = self._record  # type: ignore[method-assign]

    def _record(self, step: SchedulerOutput) -> ModelRunnerOutput:
        result = self._execute(step)
        self.steps.append((step, result))
        return result

    def serve(self, requests: Iterable[EngineRequest]) -> Told:
        """Add the requests, wait for their grammars, and step until all have ended; the books are checked each time."""
        core = self.core
        steps_left = MOST_STEPS
        for request in requests:
            assert core.handle(request) is None
            steps_left += MOST_STEPS
        while core.scheduler.take_stats().num_held:
            self._take([core.handle(core.inbox.get(timeout=20))])
        while core.scheduler.has_work:
            assert steps_left, "no end in sight"
            steps_left -= 1
            self.step()
        core.executor.forget(core.scheduler.take_finished())
        assert_nothing_is_held(core)
        return self

    def step(self) -> list[str]:
        """One step, and a look into the books. Returns who has ended."""
        batch = self.core.step()
        self.core.scheduler.check_integrity()
        self.preemptions += batch.stats.num_preemptions
        self._take(batch.outputs)
        return [output.request_id for output in batch.outputs if output.finish_reason is not None]

    def forget(self, name: str) -> None:
        """What was told of a request that will be sent once more."""
        self.tokens.pop(name, None)

    def _take(self, outputs: Iterable[EngineOutput | None]) -> None:
        for output in outputs:
            if output is None:
                continue
            name = output.request_id
            self.tokens.setdefault(name, []).extend(output.new_token_ids)
            self.logprobs.setdefault(name, []).extend(output.logprobs)
            self.prompt_logprobs.setdefault(name, []).extend(output.prompt_logprobs)
            if output.finish_reason is not None:
                self.ends[name] = output

    @property
    def errors(self) -> dict[str, str]:
        return {name: end.error for name, end in self.ends.items() if end.error is not None}


def assert_nothing_is_held(core: EngineCore) -> None:
    scheduler = core.scheduler
    assert scheduler.holds_nothing
    assert scheduler.kv.pool.num_free == scheduler.limits.num_blocks
    assert scheduler.encoder.num_available == scheduler.limits.num_tile_slots
    assert not runner_of(core)._states


# -- in a process of its own ------------------------------------------------------------------------------------------


def core_without_device(folder: Path) -> EngineCore:
    """An engine whose device breaks in its first step."""
    core = make_core(folder)
    at_each_run(core, lambda ids: break_device())
    return core


def core_without_memory(config: ServerConfig, folder: Path, *, index: int) -> EngineCore:
    from server.launch import build_core

    core = build_core(config, folder, index=index)
    file = Path(os.environ[FAULT_FILE])
    at_each_run(core, lambda ids: run_out_of_memory() if file.exists() else None)
    return core


def main() -> int:
    from server import cli, launch
    from tests.runner import faults  # by its name, which the engine's process can import; not as __main__

    launch.build_core = faults.core_without_memory
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
