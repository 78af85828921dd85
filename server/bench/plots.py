"""Draws the curves of a suite as SVG files: the median of the rounds for each server, in a band from least to most."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from server.bench.side_by_side import RowResult
from server.bench.suite import CURVES

INCHES = (6.4, 4.0)


class PlotsError(Exception):
    """The library that draws is not installed."""


@dataclass(frozen=True, slots=True)
class Plot:
    """One file. `lines` is by server: for each x the values of its rounds."""

    name: str
    x_label: str
    y_label: str
    lines: Mapping[str, Mapping[int, Sequence[float]]]


def require_matplotlib() -> None:
    """Raises PlotsError that says what to install."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PlotsError("matplotlib is not installed: pip install 'idefics2-server[train]'") from None


def plots_of(results: Sequence[RowResult]) -> list[Plot]:
    """A plot of each curve that has a value, and one of the memory held along it where a server tells."""
    found = []
    for curve, x_label in CURVES.items():
        points = [result for result in results if result.row.curve == curve]
        if not points:
            continue
        y_label = "output tokens/s" if points[0].row.measure == "tokens/s" else "ms to the first token"
        values = _lines((point.row.x, point.values) for point in points)
        memory = _lines((point.row.x, point.memory) for point in points)
        for name, label, lines in ((curve, y_label, values), (f"{curve}-memory", "MiB held", memory)):
            if lines:
                found.append(Plot(name, x_label, label, lines))
    return found


def _lines(points: Iterable[tuple[int, Mapping[str, Sequence[float]]]]) -> dict[str, dict[int, Sequence[float]]]:
    lines: dict[str, dict[int, Sequence[float]]] = {}
    for x, by_server in points:
        for name, values in by_server.items():
            lines.setdefault(name, {})[x] = values
    return lines


def draw(results: Sequence[RowResult], folder: Path) -> list[Path]:
    """Write a file for each plot into the folder, which is there, and return their paths."""
    # Imported here: it is in the extra `train`, and a bench without plots does not wait for it.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    paths = []
    # Text stays text, which can be searched, and the same numbers make the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "bench"}):
        for plot in plots_of(results):
            figure = Figure(figsize=INCHES, layout="constrained")
            axes = figure.subplots()
            for name, line in plot.lines.items():
                xs = sorted(line)
                (drawn,) = axes.plot(xs, [statistics.median(line[x]) for x in xs], marker="o", label=name)
                least, most = [min(line[x]) for x in xs], [max(line[x]) for x in xs]
                axes.fill_between(xs, least, most, color=drawn.get_color(), alpha=0.2, linewidth=0)
            places = sorted({x for line in plot.lines.values() for x in line})
            if places[0] > 0:
                axes.set_xscale("log", base=2)
            axes.set_xticks(places, [f"{place:,}" for place in places])
            axes.minorticks_off()
            axes.set_ylim(
                0, 1.05 * max(value for line in plot.lines.values() for values in line.values() for value in values)
            )
            axes.set_xlabel(plot.x_label)
            axes.set_ylabel(plot.y_label)
            axes.grid(alpha=0.3)
            axes.legend()
            path = folder / f"{plot.name}.svg"
            figure.savefig(path, format="svg", metadata={"Date": None})
            paths.append(path)
    return paths
