"""Weights as the engine stores them against the plain model: equal answers in float32, near ones with fewer bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.config import ServerConfig
from server.engine.core import EngineCore
from server.launch import build_core
from server.model.layers.packed import has_narrow_weights
from server.runner.hardware import choose_quantization
from server.types import EngineRequest, PlaceholderRange, SamplingParams
from tests.engines import drive, noise_image, real_core, record_first_logits, tiles_of

CPU = torch.device("cpu")
NUM_REQUESTS = 12
NEW_TOKENS = 12
ROWS = 64

narrow = pytest.mark.skipif(not has_narrow_weights(), reason="PyTorch has no such products on this architecture")


def requests() -> list[EngineRequest]:
    """Prompts of all lengths, every third with a picture."""
    made = []
    for index in range(NUM_REQUESTS):
        tiles = tuple(tiles_of(noise_image(150 + 20 * index, 120, index), split=False)) if index % 3 == 0 else ()
        text = [100 + (37 * index + step * step) % 20000 for step in range(3 + 9 * index)]
        made.append(
            EngineRequest(
                request_id=f"r{index}",
                prompt_token_ids=[1, *[32001] * ROWS * len(tiles), *text],
                sampling=SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True),
                eos_token_ids=(),
                tiles=tiles,
                placeholders=tuple(PlaceholderRange(1 + ROWS * place, ROWS) for place in range(len(tiles))),
            )
        )
    return made


def plain_core(folder: Path) -> EngineCore:
    config = ServerConfig(device="cpu", dtype="float32", max_model_len=4096, kv_cache_memory_gb=0.1, warm_up=False)
    return build_core(config, folder, pack_weights=False)


def answer(core: EngineCore) -> tuple[dict[str, list[int]], torch.Tensor]:
    """Tokens by request, and all first logits [requests, vocab]."""
    logits = record_first_logits(core)
    tokens = drive(core, requests()).tokens
    return tokens, torch.stack([logits[f"r{index}"] for index in range(NUM_REQUESTS)])[:, :32000]


@pytest.mark.parametrize("checkpoint", ["tiny_checkpoint", "tied_checkpoint"])
def test_packed_float32_answers_as_the_plain_model_does(checkpoint: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(checkpoint)
    plain, plain_logits = answer(plain_core(folder))
    packed, packed_logits = answer(real_core(folder))
    assert packed == plain
    assert (packed_logits - plain_logits).abs().max() < 1e-4 * plain_logits.abs().max()


@narrow
@pytest.mark.parametrize(("quantization", "most"), [("fp16", 2e-3), ("int8", 0.1)])
@pytest.mark.parametrize("checkpoint", ["tiny_checkpoint", "tied_checkpoint"])
def test_fewer_bits_move_the_logits_by_little(
    checkpoint: str, quantization: str, most: float, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(checkpoint)
    _, plain = answer(plain_core(folder))
    _, found = answer(real_core(folder, quantization=quantization))
    assert 0 < (found - plain).norm() / plain.norm() < most


@narrow
def test_eight_bits_answer_alone_as_in_a_batch(tiny_checkpoint: Path) -> None:
    core = real_core(tiny_checkpoint, quantization="int8", enable_prefix_caching=False)
    together = drive(core, requests()).tokens
    alone: dict[str, list[int]] = {}
    for request in requests():
        alone |= drive(core, [request]).tokens
    assert alone == together


def test_sixteen_bits_are_for_cpus_that_emulate_them_and_only_where_nothing_was_asked_for(monkeypatch) -> None:
    monkeypatch.setattr("server.runner.hardware.has_narrow_weights", lambda: True)
    has_bf16 = {"amx_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has_bf16)
    assert choose_quantization(ServerConfig(), CPU) == "none"
    has_bf16.clear()
    assert choose_quantization(ServerConfig(), CPU) == "fp16"
    assert choose_quantization(ServerConfig(dtype="float32"), CPU) == "none"
    assert choose_quantization(ServerConfig(), torch.device("cuda")) == "none"
    assert choose_quantization(ServerConfig(quantization="int8"), CPU) == "int8"
    monkeypatch.setattr("server.runner.hardware.has_narrow_weights", lambda: False)
    assert choose_quantization(ServerConfig(), CPU) == "none"
