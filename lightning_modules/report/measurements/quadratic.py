"""Mini-batches as quadratics: the figure, its caption, and what the page says first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lightning_modules.report.measurements.numbers import (
    ONE_POINT,
    columns,
    finite,
    measured_by,
    series,
    value_of,
    values_of,
)
from lightning_modules.report.page import new_figure
from lightning_modules.report.style import COLORS, GREY
from lightning_modules.report.verdicts import Numbers, side, spread
from lightning_modules.support import quantities
from lightning_modules.support.files import Rows
from lightning_modules.support.paired import t_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SAME = 1 + 1e-9  # rates are products of floats


def draw_quadratic(rows: Rows) -> tuple[Figure, str]:
    """Losses along a batch's own gradient, of it and of an unseen one, best rates, a fixed batch; with the caption."""
    figure, (seen, unseen, rates, path) = new_figure(2, rows=2)
    for batch in measured_by(rows):
        best, lr = value_of(batch, quantities.BEST_RATE), value_of(batch, quantities.LR)
        curve = _curve(batch, quantities.OWN)
        if math.isfinite(best) and curve[0][1] > min(loss for _, loss in curve):
            drop = curve[0][1] - value_of(batch, quantities.PREDICTED_LOSS, at=best)
            seen.plot(*columns([(at / best, (loss - curve[0][1]) / drop) for at, loss in curve]), ".-", color=COLORS[0])
        held_out = [(at, loss) for at, loss in _curve(batch, quantities.HELD_OUT) if at <= 2 * lr * _SAME]
        if lr > 0:  # a warm-up may begin at 0
            unseen.plot(
                *columns([(at / lr, loss - held_out[0][1]) for at, loss in held_out]), color=GREY, linewidth=0.6
            )
    grid = np.linspace(0, 2, 50)
    seen.plot(grid, grid**2 - 2 * grid, color=COLORS[1], label="predicted by g and Hg")
    seen.set(xlabel="rate / best rate of the batch", ylabel="change of its loss / predicted drop")
    seen.legend(frameon=False, fontsize=8)
    unseen.plot(*columns(_mean_curve(rows)), "o-", color=COLORS[0], label="mean")
    unseen.axvline(0.5, color=COLORS[1], linestyle="--", linewidth=1, label="lr / 2")
    unseen.set(xlabel="rate / lr", ylabel="change of an unseen batch's loss")
    unseen.legend(frameon=False, fontsize=8)
    rates.plot(series(rows, quantities.LR)[0], _ratios(rows), "o", color=COLORS[0], markersize=4)
    rates.axhline(1, color=GREY, linewidth=0.8)
    rates.set(xlabel="optimizer steps", ylabel="best rate of a batch / lr", yscale="log")
    fixed = _fixed(rows)
    for column, style, color, label in (
        (1, "o-", COLORS[0], "at the iterates"),
        (2, "s-", COLORS[2], "after its best step"),
        (3, "x--", COLORS[1], "after it, predicted by g and Hg"),
    ):
        path.plot(*columns([(point[0], point[column]) for point in fixed]), style, color=color, label=label)
    above = all(value > 0 for point in fixed for value in point[1:] if math.isfinite(value))
    path.set(xlabel="optimizer steps", ylabel="loss of one fixed batch", yscale="log" if fixed and above else "linear")
    path.legend(frameon=False, fontsize=8)
    return figure, _caption(rows) + _fixed_words(fixed)


def summarize_quadratic(rows: Rows) -> str:
    """One sentence: the best rate of a batch, and whether its step does less for another."""
    batches = measured_by(rows)
    if len(batches) == 1:
        return f"Quadratic: one batch, at step {rows[0]['step']}; {ONE_POINT}."
    return (
        f"Quadratic, a batch's loss along its own gradient: {_rate_words(rows)}. That the step which is best for its "
        f"own batch does less for another is {side(*t_interval(_gaps(rows)))} by this run."
    )


def _caption(rows: Rows) -> str:
    gaps = _gaps(rows)
    verdict = (
        "One batch's loss along its own gradient, and that of a batch which the step has not seen. That the step which "
        f"is best for its own batch does less for another is {side(*t_interval(gaps))} by this run"
    )
    if len(measured_by(rows)) == 1:
        return f"{verdict}; {ONE_POINT}."
    fits = finite(values_of(rows, quantities.R_SQUARED))
    explained = max(0.0, 100 * float(np.median(fits))) if len(fits) else 0.0  # below 0 it does worse than their mean
    words = (
        f"{verdict}: the other's loss ends {spread(gaps)} above, changes compared. The quadratic explains "
        f"{explained:.1f} % of the variance of the batch's own losses (median of {len(fits)}); {_rate_words(rows)}."
    )
    if not (curve := _mean_curve(rows)):
        return words
    least = min(curve, key=lambda point: point[1])[0]
    return (
        f"{words} For unseen batches the best of the rates tried is {least:g} times lr, where one half is predicted "
        "for stationary SGD without momentum."
    )


def _fixed(rows: Rows) -> list[tuple[int, float, float, float]]:
    """Steps, loss of the fixed batch, and after its best step, measured and predicted; NaN where there is none."""
    points = []
    for batch in measured_by(rows):
        curve = _curve(batch, quantities.FIXED)
        predicted = [
            row["value"]
            for row in batch
            if row["quantity"] == quantities.PREDICTED_LOSS and row.get("of") == quantities.FIXED
        ]
        if curve:  # files of earlier releases have none
            end = (curve[-1][1], predicted[0]) if predicted else (math.nan, math.nan)
            points.append((batch[0]["step"], curve[0][1], *end))
    return points


def _fixed_words(fixed: Sequence[tuple[int, float, float, float]]) -> str:
    """What one gradient step does for a batch, beside what the whole path does."""
    ends = [end for _, _, end, _ in fixed if math.isfinite(end)]
    starts = [start for _, start, *_ in fixed if math.isfinite(start)]
    if len(starts) < 2 or not ends:
        return ""
    least = min(starts)
    below = sum(end < least for end in ends)
    return (
        f" One fixed batch along the whole path: its loss goes from {starts[0]:.3g} to {starts[-1]:.3g}, {least:.3g} "
        f"at the lowest; one step along its own gradient ends below that from {below} of {len(ends)} points (no "
        "verdict: points of one path and one batch are no replicates). Assumed: the batch's loss is a quadratic along "
        "its gradient."
    )


def _rate_words(rows: Rows) -> str:
    ratios = finite(_ratios(rows))
    if not values_of(rows, quantities.LR).any():
        return "its best rate is no multiple of lr, which was 0"
    if not len(ratios):
        return "no batch has a best rate, for none has positive curvature along its gradient"
    return f"its best rate is {np.median(ratios):.3g} times lr (median of {len(ratios)})"


def _gaps(rows: Rows) -> list[float]:
    """Losses to the unseen batch, beside its own, of a batch's best step, where there is a best one."""
    gaps = []
    for batch in measured_by(rows):
        best = value_of(batch, quantities.BEST_RATE)
        if math.isfinite(best):
            losses, unseen = dict(_curve(batch, quantities.OWN)), dict(_curve(batch, quantities.HELD_OUT))
            gaps.append((unseen[best] - unseen[0.0]) - (losses[best] - losses[0.0]))
    return gaps


def _ratios(rows: Rows) -> Numbers:
    """Best rates, in learning rates, (n,); NaN where that was 0."""
    lr = values_of(rows, quantities.LR)
    return values_of(rows, quantities.BEST_RATE) / np.where(lr > 0, lr, np.nan)


def _curve(rows: Rows, of: str) -> list[tuple[float, float]]:
    points = [row for row in rows if row["quantity"] == quantities.LOSS and row.get("of") == of]
    return sorted((row["at"], row["value"]) for row in points)


def _mean_curve(rows: Rows) -> list[tuple[float, float]]:
    """Mean change of unseen batches' losses against rate / lr; none where that was 0 all along."""
    changes: dict[float, list[float]] = {}
    for batch in measured_by(rows):
        lr, curve = value_of(batch, quantities.LR), _curve(batch, quantities.HELD_OUT)
        for at, loss in curve if lr > 0 else ():
            if at <= 2 * lr * _SAME and at != value_of(batch, quantities.BEST_RATE):
                changes.setdefault(round(at / lr, 6), []).append(loss - curve[0][1])
    return [(rate, float(np.mean(values))) for rate, values in sorted(changes.items())]
