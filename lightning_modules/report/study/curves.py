"""Curves of a study's methods: every seed thin, the median over the seeds thick."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_modules.report.drawing import legend_beside
from lightning_modules.report.page import new_figure
from lightning_modules.report.study.files import Files
from lightning_modules.report.study.numbers import upper
from lightning_modules.report.style import MethodStyle
from lightning_modules.support.files import Rows
from lightning_modules.support.score import Measure

_AXES = {"step": "optimizer steps", "seconds": "seconds of training"}
_LINES = "Thin: every seed; thick: the median over the seeds."

Point = tuple[dict[str, float], float]  # row of a run's steps, value there


def curve_figures(files: Files) -> dict[str, tuple[Figure, str]]:
    """Name to figure and caption: training loss, and the score in validation, against steps and seconds."""
    if not (loss := loss_figure(files)):
        return {}
    measure = files.score.validation
    score = _against_costs(files, lambda run: _scores(run, measure), measure.header, log=False)
    return {
        **loss,
        measure.label.replace(" ", "-"): (score, f"{upper(measure.label)} after each epoch. {_LINES}"),
    }


def loss_figure(files: Files) -> dict[str, tuple[Figure, str]]:
    """The first of them alone; none where the runs are not there."""
    if not any(rows for runs in files.metrics.values() for rows in runs.values()):
        return {}
    figure = _against_costs(files, epoch_losses, "training loss, mean of each epoch", log=True)
    return {"training-loss": (figure, f"Training loss against steps and against seconds. {_LINES}")}


def plot(axes: Axes, style: MethodStyle, x: Any, y: Any, *, marker: str = "", linewidth: float = 1.8) -> None:
    """A method's main curve."""
    look: dict[str, Any] = {"color": style.color, "linestyle": style.line, "marker": marker, "linewidth": linewidth}
    axes.plot(x, y, label=style.label, gid=style.label, zorder=3, markersize=4, **look)


def has_logarithm(axes: Axes) -> bool:
    """Whether there is anything to draw, for a method that diverged has no curve from there on, and all above 0."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()] or [np.empty(0)])
    finite = values[np.isfinite(values)]
    return bool(len(finite) and (finite > 0).all())


def epoch_losses(run: Rows) -> list[Point]:
    """Mean loss of each epoch, at its last step; the last epoch may be cut short."""
    ends = [i for i, row in enumerate(run) if i + 1 == len(run) or run[i + 1]["epoch"] != row["epoch"]]
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [
        (run[b], float(np.mean([row["loss"] for row in run[a : b + 1]]))) for a, b in zip(starts, ends, strict=True)
    ]


def _scores(run: Rows, measure: Measure) -> list[Point]:
    """What validations said, as it is printed."""
    return [(row, measure.factor * row[measure.column]) for row in run if measure.column in row]


def _against_costs(files: Files, points: Callable[[Rows], list[Point]], ylabel: str, *, log: bool) -> Figure:
    figure, panels = new_figure(len(_AXES))
    for method, runs in files.metrics.items():
        curves = {seed: curve for seed, run in runs.items() if (curve := points(run))}
        if not curves:
            continue
        for axes, cost in zip(panels, _AXES, strict=True):
            plot_runs(axes, files.styles[method], cost, curves)
    for axes, name in zip(panels, _AXES.values(), strict=True):
        axes.set(xlabel=name, yscale="log" if log and has_logarithm(axes) else "linear")
    panels[0].set_ylabel(ylabel)
    legend_beside(figure, panels[0])
    return figure


def plot_runs(axes: Axes, style: MethodStyle, cost: str, curves: dict[int, list[Point]]) -> None:
    """A method's curves by seed, at least one, and their median up to the end of the shortest."""
    length = min(map(len, curves.values()))
    plot_seeds(axes, style, cost, curves)
    x, y = (
        np.array([[row[cost] for row, _ in curve[:length]] for curve in curves.values()]),  # (seeds, points)
        np.array([[value for _, value in curve[:length]] for curve in curves.values()]),
    )
    plot(axes, style, np.median(x, axis=0), np.median(y, axis=0), marker="o" if length == 1 else "")


def plot_seeds(axes: Axes, style: MethodStyle, cost: str, curves: dict[int, list[Point]]) -> None:
    """Every seed's curve of a method, behind the main one; none where there is one seed."""
    for seed, curve in curves.items() if len(curves) > 1 else ():
        x, y = [row[cost] for row, _ in curve], [value for _, value in curve]
        name = f"_{style.label}, seed {seed}"  # that begins with _, so it is in no legend
        axes.plot(x, y, linestyle=style.line, color=style.color, alpha=0.35, linewidth=0.7, label=name, gid=style.label)
