from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from server.bench.plots import PlotsError, draw, plots_of, require_matplotlib
from server.bench.side_by_side import RowResult
from server.bench.suite import SCALING, Row


def point(name: str, ours: list[float], **changes: Any) -> RowResult:
    """A row of the suite `scaling` with what our server gave in each round."""
    return RowResult(next(row for row in SCALING if row.name == name), {"ours": ours}, **changes)


CURVE = [point("concurrency-1", [10.0, 12.0]), point("concurrency-8", [60.0, 80.0], memory={"ours": [5.0]})]


def test_a_curve_has_the_rounds_of_each_server_at_each_point() -> None:
    CURVE[0].values["peer"] = [7.0, 9.0]
    rates, memory = plots_of(CURVE)
    assert (rates.name, rates.x_label, rates.y_label) == ("concurrency", "requests in flight", "output tokens/s")
    assert rates.lines == {"ours": {1: [10.0, 12.0], 8: [60.0, 80.0]}, "peer": {1: [7.0, 9.0]}}
    assert (memory.name, memory.y_label, memory.lines) == ("concurrency-memory", "MiB held", {"ours": {8: [5.0]}})


def test_times_are_labelled_as_such_and_curves_are_kept_apart() -> None:
    images, prompt = point("images-0", [1.0]), point("prompt-128", [2.0])
    assert [(plot.name, plot.y_label) for plot in plots_of([images, prompt])] == [
        ("prompt", "ms to the first token"),
        ("images", "ms to the first token"),
    ]


def test_what_has_no_value_is_not_drawn() -> None:
    table_row = RowResult(Row(name="text-1", measure="tokens/s"), {"ours": [1.0]})
    refused = point("prompt-8000", [])
    refused.drop("ours", "HTTP 400")
    assert plots_of([table_row, refused]) == []


def test_files_hold_axes_and_servers_as_text_and_are_the_same_each_time(tmp_path: Path) -> None:
    paths = draw([*CURVE, point("images-0", [1.0]), point("images-16", [9.0])], tmp_path)
    assert [path.name for path in paths] == ["concurrency.svg", "concurrency-memory.svg", "images.svg"]
    drawn = paths[0].read_text()
    for label in ("requests in flight", "output tokens/s", "ours"):
        assert f">{label}<" in drawn
    assert ">16<" in paths[2].read_text()
    before = paths[0].read_bytes()
    draw(CURVE, tmp_path)
    assert paths[0].read_bytes() == before


def test_without_the_library_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    require_matplotlib()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotsError, match=r"pip install 'idefics2-server\[train\]'"):
        require_matplotlib()
