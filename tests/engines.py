"""Real engines for tests: a checkpoint on disk, the model in memory, stepped by hand. No HTTP."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from server.config import ServerConfig
from server.engine.core import EngineCore
from server.launch import build_core
from server.runner.input_batch import RequestState
from server.runner.model_runner import ModelRunner
from server.runner.sampler import Sampler
from server.types import EngineRequest, FinishReason, ImageSettings, Tile
from tests.inputs.pictures import make_tiles


class RecordingSampler(Sampler):
    """The sampler, keeping a copy of each request's first logits [vocab]."""

    def __init__(self, forbidden_token_ids: Sequence[int]) -> None:
        super().__init__(forbidden_token_ids, torch.device("cpu"))
        self.first_logits: dict[str, Tensor] = {}

    def sample(self, logits: Tensor, states: Sequence[RequestState]) -> Tensor:
        for row, state in zip(logits, states, strict=True):
            if state.num_output_tokens == 0:
                self.first_logits[state.source.request_id] = row.clone()
        return super().sample(logits, states)


def real_core(folder: Path, **settings: object) -> EngineCore:
    """An engine in float32 on CPU around the model in `folder`."""
    defaults: dict[str, object] = {
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 4096,
        "kv_cache_memory_gb": 0.1,
        "warm_up": False,
    }
    return build_core(ServerConfig(**{**defaults, **settings}), folder)  # type: ignore[arg-type]


def record_first_logits(core: EngineCore) -> dict[str, Tensor]:
    """From now on, keep each request's first logits; they appear in the returned dict."""
    assert isinstance(core.executor, ModelRunner)
    sampler = RecordingSampler(core.executor._sampler.forbidden_token_ids)
    core.executor._sampler = sampler
    return sampler.first_logits


class Answers:
    """What came of each request."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.cached: dict[str, int] = {}
        self.preemptions = 0
        self.encoded_tiles = 0


def drive(core: EngineCore, requests: Iterable[EngineRequest], answers: Answers | None = None) -> Answers:
    """Add the requests and step until the engine is idle; its books are checked after each step."""
    answers = answers or Answers()
    for request in requests:
        core.scheduler.add(request)
    while core.scheduler.has_work:
        one_step(core, answers)
    core.executor.forget(core.scheduler.take_finished())
    assert core.scheduler.holds_nothing
    return answers


def one_step(core: EngineCore, answers: Answers) -> None:
    batch = core.step()
    core.scheduler.check_integrity()
    answers.preemptions += batch.stats.num_preemptions
    answers.encoded_tiles += batch.stats.num_encoded_tiles
    for output in batch.outputs:
        assert output.error is None, output.error
        answers.tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
        answers.cached[output.request_id] = output.num_cached_tokens
        if output.finish_reason:
            answers.reasons[output.request_id] = output.finish_reason


def noise_image(width: int, height: int, seed: int) -> Image.Image:
    """A picture with structure at several scales, different for each seed."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (5, 7, 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(coarse.numpy()).resize((width, height), Image.Resampling.BICUBIC)
    fine = torch.randint(0, 60, (height, width, 3), generator=generator, dtype=torch.uint8)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return Image.fromarray((pixels // 2 + fine).numpy())


def tiles_of(image: Image.Image, *, split: bool) -> list[Tile]:
    return make_tiles(
        image, split=split, settings=ImageSettings(shortest_edge=378, longest_edge=980, do_image_splitting=split)
    )


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
