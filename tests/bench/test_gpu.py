"""The command that measures on a GPU, tried where there is none: every row for every variant."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from server.bench import gpu
from server.demo.checkpoint import write_checkpoint


def test_every_row_is_measured_for_every_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, "tiny", weights=False)
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(gpu, "matrix_flops", lambda device, dtype: 1e10)
    flags = "--device cpu --dtype float32 --batch 3 --context 40 --prompt 300 --edge 56 --generations 2 --rounds 1"
    flags += " --steps 2 --kv-cache-memory-gb 0.1"
    monkeypatch.setattr(sys, "argv", ["gpu", str(tmp_path), *flags.split()])
    assert gpu.main() == 0
    machine, header, _, *rows = capsys.readouterr().out.splitlines()
    assert machine.startswith("no GPU; float32; copies 1 GB/s")
    assert header.endswith("| default | without graphs | SDPA |")
    assert [row.split(" | ")[0] for row in rows] == [
        "| a token of 1 answer",
        "| a token of each of 3 at 40 of context",
        "| a prompt of 300",
        "| 5 tiles of 56×56",
        "| the card's 2 generations at once, split",
        "| the card's 2 generations at once, not split",
        "| GiB at the most, KV cache included",
    ]
    for row in rows[:3]:
        assert re.fullmatch(r"\| .* \|( [\d.]+ \(\d+%\) \|){3}", row), row
    for row in rows[3:]:
        assert re.fullmatch(r"\| .* \|( [\d.]+ \|){3}", row), row
