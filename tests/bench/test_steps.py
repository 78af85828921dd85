from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from server.bench import steps


def test_every_job_is_measured_for_every_variant(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """More answers than one step can admit, so that the first grow while the last wait."""
    flags = "--variant plain,dtype=float32 --variant dtype=float32 --batch 1 6 --context 200 --prompt 500 --tile 378"
    monkeypatch.setattr(sys, "argv", ["steps", str(tiny_checkpoint), *flags.split(), "--rounds", "2", "--steps", "2"])
    monkeypatch.setattr(steps, "read_bandwidth", lambda: 1e9)
    assert steps.main() == 0
    _, header, _, *rows = capsys.readouterr().out.splitlines()
    assert header == "| milliseconds | plain,dtype=float32 | dtype=float32 |"
    assert [row.split(" | ")[0] for row in rows] == [
        "| decode, 1 at once",
        "| decode, 6 at once",
        "| prompt of 500",
        "| tile of 378×378",
    ]
    assert all(re.fullmatch(r"\| .* \| [\d.]+ \| [\d.]+ \([\d.]+×\) \|", row) for row in rows)
