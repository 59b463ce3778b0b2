"""Final values of a study: every seed as a point, with the mean and its interval, and what failed at the edge."""

from __future__ import annotations

import math
from collections.abc import Collection
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from lightning_modules.report.drawing import legend_beside
from lightning_modules.report.page import new_figure
from lightning_modules.report.study.files import Files
from lightning_modules.report.study.numbers import upper
from lightning_modules.report.study.tables import shown_measures
from lightning_modules.report.style import GREY
from lightning_modules.report.verdicts import Numbers
from lightning_modules.support.read_outs import READ_OUTS, label_of
from lightning_modules.support.score import Measure

_WIDTH = 36  # letters of a name in a line, beside its points
SEEDS = "final-values"  # name of the figure

_MARKERS = {"last": "o", "ema": "^", "swa": "s", "two-point": "D", "best": "*"}
_LANE = 0.19  # of a method's row, between its read-outs
_DODGE = 0.045  # of a row, between points of one value
_ROW = 0.75  # inches


def seed_figures(files: Files) -> dict[str, tuple[Figure, str]]:
    """Name to figure and caption."""
    measures = shown_measures(files)
    figure, panels = new_figure(len(measures))
    width, _ = figure.get_size_inches()
    figure.set_size_inches(width + 1.2 * len(measures), 1.1 + _ROW * len(files.methods))
    for axes, measure in zip(panels, measures, strict=True):
        draw_values(axes, files, measure)
    legend_beside(figure, panels[0])
    labels = " and ".join(measure.label for measure in measures)
    failed = " At the right edge: seeds that failed." if any(files.failed.values()) else ""
    words = f"{upper(labels)}: every seed as a point; line: the mean with its 95 % interval.{failed}"
    return {SEEDS: (figure, words)}


def draw_values(axes: Axes, files: Files, measure: Measure, *, read_outs: Collection[str] = READ_OUTS) -> None:
    """Methods below each other, and in each one's row its read-outs, or those of them that are wanted."""
    shown = [name for name in READ_OUTS if name in read_outs and any(row["read_out"] == name for row in files.results)]
    found = {(entry["method"], entry["read_out"]): entry for entry in files.entries(measure.column)}
    for row, method in enumerate(files.methods):
        for number, read_out in enumerate(shown):
            y = row + _LANE * (number - (len(shown) - 1) / 2)
            values = [v for v in files.values(method, read_out, measure).values() if math.isfinite(v)]
            entry = found.get((method, read_out))
            if values and entry is not None:
                _points(axes, files, measure, method, read_out, y, values, entry)
        if failed := len(files.failed[method]):
            axes.annotate(
                f"\N{MULTIPLICATION SIGN} {failed} failed",
                *((1, row), (4, 0)),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
                va="center",
                fontsize=8,
                annotation_clip=False,
            )
    for read_out in shown:  # what the legend shows, for the points of all methods
        axes.plot([], [], _MARKERS[read_out], color=GREY, label=label_of(read_out), markersize=5)
    axes.set_yticks(range(len(files.methods)), [fill(files.label(method), _WIDTH) for method in files.methods])
    axes.set_ylim(len(files.methods) - 0.5, -0.5)
    log = files.effect(measure) == "ratio" and any(len(line.get_xdata()) for line in axes.get_lines())  # type: ignore[arg-type]
    axes.set(xlabel=measure.header, xscale="log" if log else "linear")
    low, high = axes.get_xlim()
    if log and high < 10 * low:  # where powers of ten are too few
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(visible=False, axis="y")


def _points(
    axes: Axes,
    files: Files,
    measure: Measure,
    method: str,
    read_out: str,
    y: float,
    values: list[float],
    entry: dict[str, Any],
) -> None:
    of: dict[str, Any] = {"gid": label_of(read_out)}  # a press on the legend hides the read-out
    marker: dict[str, Any] = {"marker": _MARKERS[read_out], "markersize": 5, "markerfacecolor": "none"}
    x = measure.factor * np.sort(values)
    color = files.styles[method].color
    axes.plot(x, y + _dodged(x), linestyle="", color=color, label=f"_{method} {read_out}", **marker, **of)
    middle, low, high = (measure.factor * entry[name] for name in ("mean", "low", "high"))
    if math.isfinite(high):
        axes.plot([low, high], [y, y], color="black", linewidth=1, label=f"_{method} {read_out} interval", **of)
    axes.plot([middle], [y], marker="|", markersize=8, color="black", label=f"_{method} {read_out} mean", **of)


def _dodged(x: Numbers) -> Numbers:
    """How far to move points that lie on each other, such as equal counts of right answers, apart in their row.

    Args:
        x: Where they are, from the lowest.
    """
    twins = np.split(np.arange(len(x)), np.flatnonzero(np.diff(x) > 1e-6 * np.abs(x[1:])) + 1)
    return np.concatenate([_DODGE * (np.arange(len(of)) - (len(of) - 1) / 2) * min(1, 3 / len(of)) for of in twins])
