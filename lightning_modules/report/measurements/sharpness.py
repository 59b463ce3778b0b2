"""The figure and the caption of the sharpest directions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_modules.report.measurements.numbers import columns, series, values_of
from lightning_modules.report.page import new_figure
from lightning_modules.report.style import COLORS, GREY
from lightning_modules.report.verdicts import side, spread, t_interval
from lightning_modules.support.files import Rows


def draw_sharpness(rows: Rows) -> tuple[Figure, str]:
    """Eigenvalues against the limit; gradients, steps and losses along the sharpest directions; with the caption."""
    brief = not any(row["quantity"] == "change after a step" for row in rows)
    figure, (spectrum, *others) = new_figure(1 if brief else 4)
    names = sorted({row["of"] for row in rows if row["quantity"] == "eigenvalue"})
    for i, name in enumerate(reversed(names)):
        first = i + 1 == len(names)
        label, alpha, width = ("eigenvalues", 1.0, 1.6) if first else (None, 0.35, 0.8)
        points = series(rows, "eigenvalue", name)
        spectrum.plot(*points, ".-", color=COLORS[0], label=label, alpha=alpha, linewidth=width)
    lines = (
        ("root-sum-square", "s-", GREY, "root-sum-square of the largest"),
        ("felt sharpness", "d-", COLORS[2], "felt by damped steps"),
        ("stability limit", "--", "black", "(2 + 2β) / lr"),
        ("damped stability limit", ":", "black", "(2 + 2β) / (γ lr)"),
    )
    for quantity, style, color, name in lines:
        points = series(rows, quantity)
        if len(points[0]) == 1 and color == "black":
            spectrum.axhline(points[1][0], linestyle=style, color=color, linewidth=1, label=name)
        elif points[0]:
            spectrum.plot(*points, style, color=color, linewidth=1, markersize=4, label=name)
    spectrum.plot(*series(rows, "batch sharpness"), "x", color=COLORS[1], markersize=4, label="batch sharpness")
    positive = all(row["value"] > 0 for row in rows if row["quantity"] == "eigenvalue")
    spectrum.set(xlabel="optimizer steps", ylabel="curvature", yscale="log" if positive else "symlog")
    spectrum.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncol=2)
    if not brief:
        _draw_steps(rows, names, *others)
    return figure, _sharpness_caption(rows, names)


def _draw_steps(rows: Rows, names: Sequence[str], cosines: Axes, steps: Axes, sections: Axes) -> None:
    """Batches' gradients in the directions, steps along them, and cross-sections."""
    for i, name in enumerate(["basis", *names[:3]]):
        at, values = series(rows, "alignment", name)
        cosines.plot(at, np.abs(values), "o", color=COLORS[i], markersize=4, label=f"|cos(g, {name})|")
    cosines.set(xlabel="optimizer steps", ylabel="alignment of batches' gradients", ylim=(0, 1.05))
    cosines.legend(frameon=False, fontsize=7)
    for i, name in enumerate([*names[:3], "random", "whole step"]):
        steps.plot(*columns(_decomposition(rows, name)), ".-", color=COLORS[i], label=name)
    steps.axhline(0, color=GREY, linewidth=0.8)
    steps.set(xlabel="multiple of the step", ylabel="mean change of the loss", xscale="log")
    steps.set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    steps.minorticks_off()
    steps.set_yscale("symlog", linthresh=_scale_of(rows))
    steps.legend(frameon=False, fontsize=7)
    last = max(row["step"] for row in rows)
    for i, name in enumerate(sorted({row["of"] for row in rows if row["quantity"] == "cross-section"})):
        own = [r for r in rows if r["quantity"] == "cross-section" and r["of"] == name and r["step"] == last]
        sections.plot(*columns([(row["at"], row["value"]) for row in own]), ".-", color=COLORS[i], label=name)
    sections.set(xlabel="offset, in usual steps along the direction", ylabel=f"loss, at step {last}", xscale="symlog")
    sections.legend(frameon=False, fontsize=7)


def _decomposition(rows: Rows, of: str) -> list[tuple[float, float]]:
    found: dict[float, list[float]] = {}
    for row in rows:
        if row["quantity"] == "change after a step" and row["of"] == of:
            found.setdefault(row["at"], []).append(row["value"])
    return [(at, float(np.mean(values))) for at, values in sorted(found.items())]


def _scale_of(rows: Rows) -> float:
    """Where the axis of changes turns from linear to logarithmic: the size of a whole step's change."""
    sizes = [abs(change) for _, change in _decomposition(rows, "whole step") if math.isfinite(change)]
    return max(1e-8, min(sizes, default=0.0))


def _sharpness_caption(rows: Rows, names: Sequence[str]) -> str:
    changes = [
        row["value"]
        for row in rows
        if row["quantity"] == "change after a step" and row["of"] == "e1" and row["at"] == 1
    ]
    limits = values_of(rows, "stability limit")
    values, felt = np.array(series(rows, "eigenvalue", "e1")[1]), values_of(rows, "felt sharpness")
    words = f"The top eigenvalue is {np.median(values):.3g}"
    if len(limits):
        words = f"The top eigenvalue is {np.median(values / limits):.2g} of the limit of stable steps"
        words += f", what damped steps feel {np.median(felt / limits[-len(felt) :]):.2g}" if len(felt) else ""
    few = "Eigenvalues are those of the evaluation samples; few samples make them larger."
    if not changes:
        return f"The sharpest directions. {words}, in the median. {few}"
    low, high = t_interval(changes)
    best = np.median(series(rows, "predicted best multiple", "e1")[1])
    inside = np.median(series(rows, "alignment", "basis")[1])
    return (
        "The sharpest directions, gradients in them, and steps along them. That SGD's step along the sharpest "
        f"direction fails to lower the loss is {side(low, high)} by this run: it changes the loss by "
        f"{spread(changes)} ({len(changes)} of them). On a quadratic the best step would be {best:.2g} times as "
        f"long (median; below one half it is too long). {words}; the top {len(names)} directions hold {inside:.2g} of "
        f"a batch's gradient, in norm (medians). {few}"
    )
