"""Packed weights against `F.linear` over the plain matrix, and the choice among them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from server.errors import ConfigError
from server.model.layers.linear import GateUpLinear, Linear
from server.model.layers.packed import (
    HalfWeight,
    Int8Weight,
    OneDnnWeight,
    Packing,
    choose_packing,
    has_narrow_weights,
    multiplies,
)

CPU = torch.device("cpu")
SHAPES = [(16, 8), (96, 40), (257, 130)]  # in and out, multiples of no vector among them
ROWS = [(1,), (5,), (2, 33), (0,)]

narrow = pytest.mark.skipif(not has_narrow_weights(), reason="PyTorch has no such products on this architecture")


def matrix(shape: tuple[int, int], *, bias: bool) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(0)
    columns, rows = shape
    return torch.randn(rows, columns) / columns**0.5, torch.randn(rows) if bias else None


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_(min=1e-30))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        (OneDnnWeight, 1e-6),
        pytest.param(HalfWeight, 1e-3, marks=narrow),
        pytest.param(Int8Weight, 2e-2, marks=narrow),
    ],
)
def test_the_product_is_that_of_the_plain_matrix(kind, tolerance, shape, rows, bias) -> None:
    weight, summand = matrix(shape, bias=bias)
    x = torch.randn(*rows, shape[0])
    wanted = F.linear(x, weight, summand)
    with torch.inference_mode():
        found = kind(weight, summand)(x)
    assert found.shape == wanted.shape
    assert found.dtype == x.dtype
    assert relative_error(found, wanted) < tolerance


@narrow
@pytest.mark.parametrize("kind", [HalfWeight, Int8Weight])
def test_activations_keep_their_type(kind) -> None:
    weight, bias = matrix((32, 24), bias=True)
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    found = kind(weight, bias)(x)
    assert found.dtype == torch.bfloat16
    assert relative_error(found.float(), F.linear(x.float(), weight, bias)) < 2e-2


@narrow
def test_bfloat16_weights_survive_in_float16_exactly() -> None:
    weight = matrix((64, 48), bias=False)[0].bfloat16()
    found = HalfWeight(weight, None)(torch.eye(64))
    assert torch.equal(found.T, weight.float())


@narrow
def test_eight_bits_of_a_row_do_not_depend_on_the_rows_beside_it() -> None:
    weight, _ = matrix((96, 40), bias=False)
    packed = Int8Weight(weight, None)
    x = torch.randn(7, 96) * torch.logspace(-3, 3, 7)[:, None]
    together = packed(x)
    assert all(torch.equal(packed(x[index : index + 1])[0], together[index]) for index in range(7))


@narrow
def test_eight_bits_never_overflow_between_the_products() -> None:
    """All bytes at their largest is the worst that a library without VNNI adds up in 16 bits."""
    weight, x = torch.ones(8, 512), torch.ones(2, 512)
    for sign in (1, -1):
        assert torch.allclose(Int8Weight(weight, None)(sign * x), torch.full((2, 8), sign * 512.0), rtol=1e-3)


@narrow
def test_eight_bits_of_zeros_are_zeros_and_of_nan_are_nan() -> None:
    weight, _ = matrix((32, 8), bias=False)
    x = torch.zeros(3, 32)
    x[1, 4] = float("nan")
    x[2] = 1.0
    found = Int8Weight(weight, None)(x)
    assert not found[0].any()
    assert found[1].isnan().all()  # so that the request is found whose numbers broke down
    assert found[2].isfinite().all()
    assert Int8Weight(torch.zeros(8, 32), None)(x[2:]).eq(0).all()


def test_a_layer_lets_go_of_its_plain_weight() -> None:
    torch.manual_seed(0)
    layer = GateUpLinear(16, 24)
    torch.nn.init.normal_(layer.weight)
    plain = copy.deepcopy(layer)
    layer.pack(Packing("float32", torch.float32, OneDnnWeight))
    x = torch.randn(4, 16)
    assert relative_error(layer(x), plain(x)) < 1e-6
    assert not hasattr(layer, "weight")
    assert not list(layer.parameters())
    with pytest.raises(ValueError, match="already"):
        layer.pack(Packing("float32", torch.float32, OneDnnWeight))
    assert isinstance(plain, Linear)


def test_what_a_cpu_multiplies_is_reordered_and_nothing_else_changes() -> None:
    packing = choose_packing("none", CPU, torch.float32)
    assert packing == Packing("float32", torch.float32, OneDnnWeight)


@narrow
def test_a_type_that_a_cpu_emulates_is_kept_in_float16() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        packing = choose_packing("none", CPU, dtype)
        if multiplies(dtype):
            assert packing == Packing(str(dtype).removeprefix("torch."), dtype, OneDnnWeight)
        else:
            assert packing == Packing("fp16", torch.float16, HalfWeight)


@narrow
def test_a_quantization_is_what_was_asked_for() -> None:
    assert choose_packing("fp16", CPU, torch.float32) == Packing("fp16", torch.float16, HalfWeight)
    assert choose_packing("int8", CPU, torch.float32) == Packing("int8", torch.float16, Int8Weight)


def test_a_gpu_keeps_its_weights_plain_and_refuses_what_it_has_no_library_for() -> None:
    cuda = torch.device("cuda")
    assert choose_packing("none", cuda, torch.bfloat16) is None
    with pytest.raises(ConfigError, match=r"quantization: int8 .* runs on cuda"):
        choose_packing("int8", cuda, torch.bfloat16)


def test_a_processor_without_the_library_says_so(monkeypatch) -> None:
    monkeypatch.setattr("server.model.layers.packed.has_narrow_weights", lambda: False)
    monkeypatch.setattr("server.model.layers.packed.multiplies", lambda dtype: dtype == torch.float32)
    assert choose_packing("none", CPU, torch.bfloat16) is None
    with pytest.raises(ConfigError, match="quantization: fp16 needs"):
        choose_packing("fp16", CPU, torch.float32)
