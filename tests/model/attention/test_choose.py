"""Kernels serve only where they run and agree with the plain twin."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from torch import Tensor

from server.errors import ConfigError
from server.model.attention.base import AttentionMetadata, LayerCache
from server.model.attention.choose import check, choose_attention
from server.model.attention.sdpa import SdpaAttention, SdpaMetadata
from server.model.attention.triton_paged import TritonAttention
from server.model.config import TextConfig

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter

CPU, FLOAT = torch.device("cpu"), torch.float32


@pytest.fixture
def text() -> TextConfig:
    return TextConfig(
        vocab_size=100,
        hidden_size=32,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=64,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_position_embeddings=4096,
        sliding_window=50,
    )


def test_a_cpu_is_served_by_the_plain_twin_unless_asked(text: TextConfig) -> None:
    assert isinstance(choose_attention("auto", text, CPU, FLOAT), SdpaAttention)
    assert isinstance(choose_attention("sdpa", text, CPU, FLOAT), SdpaAttention)
    assert isinstance(choose_attention("triton", text, CPU, FLOAT), TritonAttention)


@pytest.mark.parametrize("window", [None, 50, 3])
def test_the_kernels_pass(text: TextConfig, window: int | None) -> None:
    text = dataclasses.replace(text, sliding_window=window)
    assert isinstance(choose_attention("triton", text, CPU, FLOAT), TritonAttention)


def spoil(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    forward = TritonAttention.forward

    def spoiled(
        self: TritonAttention, query: Tensor, key: Tensor, value: Tensor, cache: LayerCache, metadata: AttentionMetadata
    ) -> Tensor:
        out = forward(self, query, key, value, cache, metadata)
        if what == "attention":
            out[-1, 0, 0] += 1.0
        elif what == "nan":
            out[0, 0, 0] = torch.nan
        else:
            cache.value[3, 0, 0, 0] += 1.0
        return out

    monkeypatch.setattr(TritonAttention, "forward", spoiled)


@pytest.mark.parametrize(("what", "named"), [("attention", "attention"), ("nan", "attention"), ("values", "values")])
def test_kernels_that_disagree_are_refused_when_asked_for(
    text: TextConfig, monkeypatch: pytest.MonkeyPatch, what: str, named: str
) -> None:
    spoil(monkeypatch, what)
    with pytest.raises(ConfigError, match=f"triton does not work here: ArithmeticError: {named} differ"):
        choose_attention("triton", text, CPU, FLOAT)


def test_on_a_device_without_working_kernels_the_plain_twin_serves(
    text: TextConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no such device here, so the check fails as it does with a driver that is too old."""
    with caplog.at_level(logging.WARNING):
        assert isinstance(choose_attention("auto", text, torch.device("cuda"), FLOAT), SdpaAttention)
    assert "PyTorch's is used" in caplog.text


class Rounding(SdpaAttention):
    """Computes in float32, and rounds up where the plain twin may have rounded down."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(sliding_window=None)
        self._step = torch.finfo(dtype).eps

    def forward(self, query: Tensor, key: Tensor, value: Tensor, cache: LayerCache, metadata: SdpaMetadata) -> Tensor:
        return super().forward(query, key, value, cache, metadata) * (1 + self._step)


def test_the_check_allows_for_the_rounding_of_a_type(text: TextConfig) -> None:
    plain = SdpaAttention(sliding_window=None)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check(Rounding(dtype), plain, text, CPU, dtype)
    with pytest.raises(ArithmeticError):
        check(SdpaAttention(sliding_window=30), plain, text, CPU, torch.bfloat16)
