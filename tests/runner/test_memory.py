"""How many blocks and how long a context, for what the hardware has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import ConfigError
from server.model.config import load_model_config
from server.runner.kv_cache import allocate_kv_cache, block_bytes
from server.runner.memory import DEFAULT_CPU_KV_GIB, GIB, choose_context, kv_budget_bytes

CPU = torch.device("cpu")


def choose(**changes: int | None) -> tuple[int, int]:
    """By default a budget of 10 blocks of 4 tokens, each of 100 bytes."""
    values: dict[str, int | None] = {
        "budget_bytes": 1000,
        "block_bytes": 100,
        "block_size": 4,
        "max_num_seqs": 100,
        "requested_len": None,
        "model_len": 1000,
    }
    return choose_context(**{**values, **changes})  # type: ignore[arg-type]


def test_a_context_that_was_not_asked_for_is_shortened_to_what_fits() -> None:
    assert choose() == (10, 40)
    assert choose(budget_bytes=1099) == (10, 40)
    assert choose(model_len=39) == (10, 39)
    assert choose(model_len=24) == (10, 24)


def test_a_context_that_was_asked_for_fits_or_is_refused() -> None:
    assert choose(requested_len=40) == (10, 40)
    with pytest.raises(ConfigError, match="max_model_len 41 needs"):
        choose(requested_len=41)


def test_a_context_longer_than_the_models_is_refused() -> None:
    assert choose(requested_len=30, model_len=30) == (10, 30)
    with pytest.raises(ConfigError, match="more than the model's 29 positions"):
        choose(requested_len=30, model_len=29)


def test_no_more_blocks_than_all_requests_together_can_use() -> None:
    assert choose(budget_bytes=10**6, max_num_seqs=3, requested_len=17) == (15, 17)
    assert choose(budget_bytes=10**6, max_num_seqs=1, model_len=8) == (2, 8)


def test_a_budget_below_one_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="kv_cache_memory_gb"):
        choose(budget_bytes=99)


@given(
    st.integers(0, 5000),
    st.integers(1, 50),
    st.integers(1, 32),
    st.integers(1, 8),
    st.one_of(st.none(), st.integers(1, 500)),
    st.integers(1, 500),
)
@settings(max_examples=500, deadline=None)
def test_what_is_chosen_fits_and_holds_one_request(
    budget: int, size: int, block_size: int, seqs: int, requested: int | None, model_len: int
) -> None:
    try:
        num_blocks, length = choose(
            budget_bytes=budget,
            block_bytes=size,
            block_size=block_size,
            max_num_seqs=seqs,
            requested_len=requested,
            model_len=model_len,
        )
    except ConfigError:
        wanted = requested or 1
        assert wanted > model_len or budget // size * block_size < wanted
        return
    assert num_blocks * size <= budget
    assert num_blocks * block_size >= length >= 1
    assert length == (requested or min(model_len, budget // size * block_size))
    assert num_blocks <= seqs * -(-length // block_size)


def forbidden_step() -> None:
    raise AssertionError("the largest step is measured only where it decides something")


def test_on_cpu_the_budget_is_what_was_asked_for_or_four_gibibytes() -> None:
    for requested, expected in ((0.5, GIB // 2), (None, int(DEFAULT_CPU_KV_GIB * GIB))):
        budget = kv_budget_bytes(
            device=CPU, requested_gib=requested, gpu_memory_utilization=0.9, run_largest_step=forbidden_step
        )
        assert budget == expected == int(expected)


class FakeCuda:
    """A GPU of 100 GiB: 8 GiB of others, 20 GiB of ours now, 30 GiB of ours at the peak of a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, others: int = 8, peak: int = 30) -> None:
        self.calls: list[str] = []
        self.others, self.ours, self.peak = others * GIB, 20 * GIB, peak * GIB
        self.top = 50 * GIB  # from loading: must not count
        for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * GIB - self.others - self.ours, 100 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.ours)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: self.top)

    def empty_cache(self) -> None:
        self.calls.append("empty")

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.calls.append("reset")
        self.top = self.ours

    def synchronize(self, device: torch.device) -> None:
        self.calls.append("synchronize")

    def largest_step(self) -> None:
        self.calls.append("step")
        self.top = max(self.top, self.peak)
        self.ours = 25 * GIB  # the allocator keeps some of what the step took

    def budget(self, utilization: float) -> int:
        return kv_budget_bytes(
            device=torch.device("cuda"),
            requested_gib=None,
            gpu_memory_utilization=utilization,
            run_largest_step=self.largest_step,
        )


def test_on_cuda_the_cache_gets_what_the_largest_step_and_others_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeCuda(monkeypatch)
    assert gpu.budget(0.9) == (90 - 30 - 8) * GIB
    assert gpu.calls[:4] == ["empty", "reset", "step", "synchronize"]
    assert gpu.calls[-1] == "empty"


def test_on_cuda_nothing_left_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization 0\.38 .* 30\.0 GiB, others 8\.0 GiB"):
        FakeCuda(monkeypatch).budget(0.38)
    assert FakeCuda(monkeypatch).budget(0.39) == pytest.approx(GIB, rel=1e-6)


def test_a_request_for_memory_is_honoured_on_cuda_too(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = kv_budget_bytes(
        device=torch.device("cuda"), requested_gib=2, gpu_memory_utilization=0.9, run_largest_step=forbidden_step
    )
    assert budget == 2 * GIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_takes_the_bytes_it_was_counted_with(tiny_checkpoint: Path, dtype: torch.dtype) -> None:
    config = load_model_config(tiny_checkpoint)
    caches = allocate_kv_cache(config, num_blocks=3, block_size=5, device=CPU, dtype=dtype)
    assert len(caches) == config.text.num_layers
    total = sum(tensor.nbytes for cache in caches for tensor in cache)
    assert total == 3 * block_bytes(config, block_size=5, dtype=dtype)
    assert all(tensor.shape[:2] == (3, 5) and not tensor.any() for cache in caches for tensor in cache)
    assert len({tensor.data_ptr() for cache in caches for tensor in cache}) == 2 * len(caches)
