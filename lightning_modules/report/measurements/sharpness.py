"""The sharpest directions: the figure, its caption, and what the page says first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_modules.report.measurements.numbers import ONE_POINT, by_step, columns, series, values_of
from lightning_modules.report.page import new_figure
from lightning_modules.report.style import COLORS, GREY
from lightning_modules.report.verdicts import side, spread
from lightning_modules.support import quantities
from lightning_modules.support.files import Rows
from lightning_modules.support.paired import t_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TOP = quantities.eigenvector(1)


def draw_sharpness(rows: Rows) -> tuple[Figure, str]:
    """Eigenvalues against the limit; gradients, steps and losses along the sharpest directions; with the caption."""
    brief = not any(row["quantity"] == quantities.CHANGE for row in rows)
    figure, (spectrum, *others) = new_figure(1 if brief else 4)
    names = _names(rows, quantities.EIGENVALUE)
    for i, name in enumerate(reversed(names)):
        first = i + 1 == len(names)
        label, alpha, width = ("eigenvalues", 1.0, 1.6) if first else (None, 0.35, 0.8)
        points = series(rows, quantities.EIGENVALUE, name)
        spectrum.plot(*points, ".-", color=COLORS[0], label=label, alpha=alpha, linewidth=width)
    lines = (
        (quantities.ROOT_SUM_SQUARE, "s-", GREY, "root-sum-square of the largest"),
        (quantities.FELT_SHARPNESS, "d-", COLORS[2], "felt by damped steps"),
        (quantities.STABILITY_LIMIT, "--", "black", "(2 + 2β) / lr"),
        (quantities.DAMPED_STABILITY_LIMIT, ":", "black", "(2 + 2β) / (γ lr)"),
    )
    for quantity, style, color, name in lines:
        points = series(rows, quantity)
        if len(points[0]) == 1 and color == "black":
            spectrum.axhline(points[1][0], linestyle=style, color=color, linewidth=1, label=name)
        elif points[0]:
            spectrum.plot(*points, style, color=color, linewidth=1, markersize=4, label=name)
    batches = series(rows, quantities.BATCH_SHARPNESS)
    spectrum.plot(*batches, "x", color=COLORS[1], markersize=4, label="batch sharpness")
    positive = all(values_of(rows, quantities.EIGENVALUE) > 0)
    spectrum.set(xlabel="optimizer steps", ylabel="curvature", yscale="log" if positive else "symlog")
    spectrum.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncol=2)
    if not brief:
        _draw_steps(rows, names, *others)
    return figure, _caption(rows, len(names))


def summarize_sharpness(rows: Rows) -> str:
    """One sentence: how the top eigenvalue went, and where it stands beside the limit of stable steps."""
    top = by_step(rows, quantities.EIGENVALUE, _TOP)
    first, last = min(top), max(top)
    if first == last:
        return f"Sharpness: measured once, at step {first}; {ONE_POINT}."
    shares = _shares(rows, top)
    limit = (
        f"; it is {np.median(shares):.2g} of the limit of stable steps in the median, and above it at "
        f"{sum(share > 1 for share in shares)} of {len(shares)} measurements"
        if shares
        else ""
    )
    felt = _shares(rows, by_step(rows, quantities.FELT_SHARPNESS))
    felt_words = f"; what damped steps feel is {np.median(felt):.2g} of it, in the median" if len(felt) > 1 else ""
    return (
        f"Sharpness: the top eigenvalue is {top[first]:.3g} at step {first} and {top[last]:.3g} at step {last}"
        f"{limit}{felt_words}."
    )


def _names(rows: Rows, quantity: str) -> list[str]:
    """Subjects of a quantity, in the order of the rows."""
    return list(dict.fromkeys(row["of"] for row in rows if row["quantity"] == quantity))


def _shares(rows: Rows, curvature: dict[int, float]) -> list[float]:
    """A curvature as a share of the limit of stable steps, at each step that has both."""
    limits = by_step(rows, quantities.STABILITY_LIMIT)
    return [value / limits[step] for step, value in curvature.items() if step in limits]


def _draw_steps(rows: Rows, names: Sequence[str], cosines: Axes, steps: Axes, sections: Axes) -> None:
    """Batches' gradients in the directions, steps along them, and cross-sections."""
    for i, name in enumerate([quantities.BASIS, *names[:3]]):
        at, values = series(rows, quantities.ALIGNMENT, name)
        cosines.plot(at, np.abs(values), "o", color=COLORS[i], markersize=4, label=f"|cos(g, {name})|")
    cosines.set(xlabel="optimizer steps", ylabel="alignment of batches' gradients", ylim=(0, 1.05))
    cosines.legend(frameon=False, fontsize=7)
    for i, name in enumerate([*names[:3], quantities.RANDOM, quantities.WHOLE_STEP]):
        steps.plot(*columns(_mean_changes(rows, name)), ".-", color=COLORS[i], label=name)
    steps.axhline(0, color=GREY, linewidth=0.8)
    steps.set(xlabel="multiple of the step", ylabel="mean change of the loss", xscale="log")
    steps.set_xticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
    steps.minorticks_off()
    steps.set_yscale("symlog", linthresh=_scale_of(rows))
    steps.legend(frameon=False, fontsize=7)
    last = max(row["step"] for row in rows)
    latest = [row for row in rows if row["quantity"] == quantities.CROSS_SECTION and row["step"] == last]
    for i, name in enumerate(_names(rows, quantities.CROSS_SECTION)):
        section = [(row["at"], row["value"]) for row in latest if row["of"] == name]
        sections.plot(*columns(section), ".-", color=COLORS[i], label=name)
    sections.set(xlabel="offset, in usual steps along the direction", ylabel=f"loss, at step {last}", xscale="symlog")
    sections.legend(frameon=False, fontsize=7)


def _mean_changes(rows: Rows, of: str) -> list[tuple[float, float]]:
    """Multiple of a step to the mean change of the loss after it."""
    changes: dict[float, list[float]] = {}
    for row in rows:
        if row["quantity"] == quantities.CHANGE and row["of"] == of:
            changes.setdefault(row["at"], []).append(row["value"])
    return [(at, float(np.mean(values))) for at, values in sorted(changes.items())]


def _scale_of(rows: Rows) -> float:
    """The point where the axis of changes turns from linear to logarithmic: the size of a whole step's change."""
    sizes = [abs(change) for _, change in _mean_changes(rows, quantities.WHOLE_STEP) if math.isfinite(change)]
    return max(1e-8, min(sizes, default=0.0))


def _caption(rows: Rows, directions: int) -> str:
    few = "Eigenvalues are those of the evaluation samples; few samples make them larger."
    changes = [
        row["value"] for row in rows if row["quantity"] == quantities.CHANGE and row["of"] == _TOP and row["at"] == 1
    ]
    top = by_step(rows, quantities.EIGENVALUE, _TOP)
    felt = _shares(rows, by_step(rows, quantities.FELT_SHARPNESS))
    verdict = (
        "The sharpest directions, gradients in them, and steps along them. That SGD's step along the sharpest "
        f"direction fails to lower the loss is {side(*t_interval(changes))} by this run"
    )
    if len(top) == 1:
        return f"{verdict}; {ONE_POINT}. {few}" if changes else f"The sharpest directions; {ONE_POINT}. {few}"
    words = f"The top eigenvalue is {np.median(list(top.values())):.3g}"
    if shares := _shares(rows, top):
        words = f"The top eigenvalue is {np.median(shares):.2g} of the limit of stable steps"
        words += f", what damped steps feel {np.median(felt):.2g}" if felt else ""
    if not changes:
        return f"The sharpest directions. {words}, in the median. {few}"
    best = np.median(series(rows, quantities.BEST_MULTIPLE, _TOP)[1])
    inside = np.median(series(rows, quantities.ALIGNMENT, quantities.BASIS)[1])
    return (
        f"{verdict}: it changes the loss by {spread(changes)} ({len(changes)} of them). On a quadratic the best step "
        f"would be {best:.2g} times as long (median; below one half it is too long). {words}; the top {directions} "
        f"directions hold {inside:.2g} of a batch's gradient, in norm (medians). {few}"
    )
