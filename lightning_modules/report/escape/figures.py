"""Figures of ``nsgd escape``, with its findings as their captions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_modules.report.drawing import legend_beside
from lightning_modules.report.escape.files import FEWEST, Files, inverse, read_folder
from lightning_modules.report.escape.findings import findings
from lightning_modules.report.page import new_figure

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#444444")  # Okabe and Ito


def escape_figures(folder: Path) -> dict[str, tuple[Figure, str]]:
    """Name to figure and caption."""
    files = read_folder(folder)
    times, damped, share, loss = findings(files)
    return {
        **({"potential": (_potential_figure(files), _potential_words(files))} if files.potential else {}),
        "escape-time": (_escape_figure(files), f"{times} {damped} {files.assumption}"),
        "flat-minimum": (_stay_figure(files), f"{share} {loss} {files.assumption}"),
    }


def _potential_figure(files: Files) -> Figure:
    figure, (axes,) = new_figure(1)
    names, barrier = files.landscape["names"], files.landscape["barrier"]
    points = {name: np.array(point) for name, point in files.landscape["points"].items()}
    x, y = ([row[name] for row in files.potential] for name in ("distance", "loss"))
    axes.plot(x, y, color="black", linewidth=1.6, label="potential f")
    for end, side, marker, color, what in (
        ("start", -1, "^", "#e69f00", "start"),
        ("goal", 1, "v", "#56b4e9", "arrive"),
    ):
        at = side * float(np.linalg.norm(points[end] - points["saddle"]))
        label = f"{names[end]} minimum, where walkers {what}"
        axes.plot([at], [float(np.interp(at, x, y))], marker, color=color, markersize=8, label=label)
    axes.plot([0], [barrier], "o", color=_COLORS[1], markersize=7, label=f"saddle, Δf = {barrier:.3g} above the start")
    axes.set(xlabel="distance from the saddle", ylabel="f above the start")
    axes.set_ylim(top=min(axes.get_ylim()[1], 2 * barrier))  # walls may be steep
    legend_beside(figure, axes)
    return figure


def _potential_words(files: Files) -> str:
    names, curvatures = files.landscape["names"], files.landscape["curvatures"]
    start, saddle, goal = (_numbers(curvatures[name]) for name in ("start", "saddle", "goal"))
    return (
        f"The potential, straight from the {names['start']} minimum over the saddle to the {names['goal']} one. "
        f"Curvatures: {start} at the start, {saddle} at the saddle, {goal} at the other minimum."
    )


def _numbers(values: list[float]) -> str:
    return " and ".join(f"{value:.3g}" for value in values)


def _points(axes: Axes, x: list[float], y: list[float], errors: list[float], **options: Any) -> None:
    twice = 2 * np.array(errors)
    axes.errorbar(x, y, yerr=twice, linestyle="none", capsize=2.5, markersize=5, **options)


def _line(axes: Axes, x: list[float], y: list[float], style: str, **options: Any) -> None:
    if not all(math.isnan(value) for value in y):
        order = np.argsort(x)
        axes.plot(np.array(x)[order], np.array(y)[order], style, linewidth=1.2, zorder=1, **options)


def _escape_figure(files: Files) -> Figure:
    figure, (times, damped) = new_figure(2)
    rows = files.of("escape")
    # Without momentum the prediction is the same at every rate.
    for i, lr in enumerate(files.config["lr"] if files.momentum else files.config["lr"][:1]):
        own = [row for row in rows if row["lr"] == lr]
        color, hidden = _COLORS[i % 5] if files.momentum else "black", "_" if i else ""
        lines = {"exact": ("-", "quadrature"), "leading": ("--", f"Eyring-Kramers, slope {files.slope}")}
        for column, (style, label) in lines.items():
            predicted = [files.time(row, column) for row in own]
            _line(times, [inverse(row) for row in own], predicted, style, color=color, label=hidden + label)
    for i, lr in enumerate(files.config["lr"]):
        seen = [row for row in rows if row["lr"] == lr and row["arrived"] >= FEWEST]
        y, errors = ([files.time(row, c) for row in seen] for c in ("measured", "standard_error"))
        look = {"marker": "os^Dv"[i % 5], "color": _COLORS[i % 5], "fillstyle": "none" if i % 2 else "full"}
        _points(times, [inverse(row) for row in seen], y, errors, label=f"SGD, η = {lr:g}", **look)
    rate = "η/(1 − β)" if files.momentum else "η"
    times.set(yscale="log", xlabel="B / η", ylabel=f"escape time, {rate} × steps", title="Time to the other minimum")
    times.legend(frameon=False, fontsize=8)
    for i, name in enumerate(files.landscape["damped"]):
        of = [row for row in files.of("damped escape") if row["damped"] == name]
        _line(damped, [row["gamma"] for row in of], [row["exact"] for row in of], "-", color=_COLORS[i])
        seen = [row for row in of if row["arrived"] >= FEWEST]
        y, errors = ([row[c] for row in seen] for c in ("measured", "standard_error"))
        gammas = [row["gamma"] for row in seen]
        _points(damped, gammas, y, errors, marker="os"[i % 2], color=_COLORS[i], label=f"{name} damped")
    damped.set(yscale="log", xlabel="γ, factor on the step along one direction", ylabel="steps to escape", title="NSGD")
    damped.legend(frameon=False, fontsize=8, title="line: predicted", title_fontsize=8)
    return figure


def _stay_figure(files: Files) -> Figure:
    figure, (shares, losses) = new_figure(2)
    both = files.of("share", origin="both")
    sizes = [row["batch_size"] for row in both]
    _line(shares, sizes, [100 * row["exact"] for row in both], "-", color="black", label="Gibbs")
    _line(shares, sizes, [100 * row["leading"] for row in both], ":", color="black", label="Laplace, free of B and η")
    for origin, marker, color in (("sharp", "^", "#e69f00"), ("flat", "v", "#56b4e9")):
        of = files.of("share", origin=origin)
        y, errors = ([100 * row[c] for row in of] for c in ("measured", "standard_error"))
        label = f"from the {origin} one, after {of[0]['steps']:,} steps"
        _points(shares, [row["batch_size"] for row in of], y, errors, marker=marker, color=color, label=label)
    y, errors = ([100 * row[c] for row in both] for c in ("measured", "standard_error"))
    _points(shares, sizes, y, errors, marker="o", color=_COLORS[0], label="from both, extrapolated")
    shares.set(ylim=(0, 100), xlabel="batch size", ylabel="walkers at the flat minimum, %", title="Where SGD stays")
    shares.legend(frameon=False, fontsize=8)
    rows = files.of("loss")
    x = [1 / inverse(row) for row in rows]
    _line(losses, x, [row["exact"] for row in rows], "-", color="black", label="quadrature")
    _line(losses, x, [row["leading"] for row in rows], ":", color="black", label="quadratic minima")
    y, errors = ([row[c] for row in rows] for c in ("measured", "standard_error"))
    _points(losses, x, y, errors, marker="o", color=_COLORS[0], label="SGD")
    losses.set(xlabel="η / B", ylabel="mean loss above the minimum", title="What a large η/B costs")
    losses.set_ylim(bottom=0)
    losses.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    losses.legend(frameon=False, fontsize=8)
    return figure
