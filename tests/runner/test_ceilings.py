from __future__ import annotations

import pytest
import torch

from server.runner import ceilings


def test_rates_are_those_that_a_machine_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "GIB", 1 << 26)
    cpu = torch.device("cpu")
    assert 1e8 < ceilings.read_bandwidth() < 1e13
    assert 1e8 < ceilings.copy_bandwidth(cpu) < 1e13
    assert 1e8 < ceilings.matrix_flops(cpu, torch.float32) < 1e15


def test_the_fastest_run_counts_and_the_first_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0, 1, 10, 19, 20, 25, 30, 37, 40, 46, 50, 58])
    monkeypatch.setattr(ceilings.time, "perf_counter", lambda: next(clock))
    assert ceilings._best(lambda: None, torch.device("cpu")) == 5
