"""The figure and the caption of mini-batches as quadratics."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from lightning_modules.report.measurements.numbers import columns, finite, value_of, values_of
from lightning_modules.report.page import new_figure
from lightning_modules.report.style import COLORS, GREY
from lightning_modules.report.verdicts import side, spread, t_interval
from lightning_modules.support.files import Rows


def draw_quadratic(rows: Rows) -> tuple[Figure, str]:
    """Losses along a batch's own gradient, of it and of an unseen one, and the best rates; with the caption."""
    figure, (own, unseen, rates) = new_figure(3)
    numbers = sorted({row["measurement"] for row in rows})
    for number in numbers:
        batch = [row for row in rows if row["measurement"] == number]
        best, lr = value_of(batch, "best rate"), value_of(batch, "lr")
        curve = _curve(batch, "own")
        if math.isfinite(best) and curve[0][1] > min(loss for _, loss in curve):
            drop = curve[0][1] - value_of(batch, "predicted loss", at=best)
            own.plot(*columns([(at / best, (loss - curve[0][1]) / drop) for at, loss in curve]), ".-", color=COLORS[0])
        held_out = [(at, loss) for at, loss in _curve(batch, "held out") if at <= 2 * lr * (1 + 1e-9)]
        unseen.plot(*columns([(at / lr, loss - held_out[0][1]) for at, loss in held_out]), color=GREY, linewidth=0.6)
    grid = np.linspace(0, 2, 50)
    own.plot(grid, grid**2 - 2 * grid, color=COLORS[1], label="predicted by g and Hg")
    own.set(xlabel="rate / best rate of the batch", ylabel="change of its loss / predicted drop")
    own.legend(frameon=False, fontsize=8)
    unseen.plot(*columns(_mean_curve(rows)), "o-", color=COLORS[0], label="mean")
    unseen.axvline(0.5, color=COLORS[1], linestyle="--", linewidth=1, label="lr / 2")
    unseen.set(xlabel="rate / lr", ylabel="change of an unseen batch's loss")
    unseen.legend(frameon=False, fontsize=8)
    steps = [row["step"] for row in rows if row["quantity"] == "lr"]
    rates.plot(steps, values_of(rows, "best rate") / values_of(rows, "lr"), "o", color=COLORS[0], markersize=4)
    rates.axhline(1, color=GREY, linewidth=0.8)
    rates.set(xlabel="optimizer steps", ylabel="best rate of a batch / lr", yscale="log")
    return figure, _quadratic_caption(rows)


def _quadratic_caption(rows: Rows) -> str:
    gaps = []
    for number in {row["measurement"] for row in rows}:
        batch = [row for row in rows if row["measurement"] == number]
        best = value_of(batch, "best rate")
        if math.isfinite(best):
            mine, other = dict(_curve(batch, "own")), dict(_curve(batch, "held out"))
            gaps.append((other[best] - other[0.0]) - (mine[best] - mine[0.0]))
    low, high = t_interval(gaps)
    curve = _mean_curve(rows)
    least = min(curve, key=lambda point: point[1])[0]
    ratios = finite(values_of(rows, "best rate") / values_of(rows, "lr"))
    fits = finite(values_of(rows, "R^2"))
    explained = max(0.0, 100 * float(np.median(fits)))  # below 0 it does worse than their mean
    return (
        "One batch's loss along its own gradient, and that of a batch which the step has not seen. That the step which "
        f"is best for its own batch does less for another is {side(low, high)} by this run: the other's loss ends "
        f"{spread(gaps)} above, changes compared. The quadratic explains {explained:.1f} % of the "
        f"variance of the batch's own losses (median of {len(fits)}); its best rate is {np.median(ratios):.3g} times "
        f"lr (median). For unseen batches the best of the rates tried is {least:g} times lr, where one half is "
        "predicted for stationary SGD without momentum."
    )


def _curve(rows: Rows, of: str) -> list[tuple[float, float]]:
    return sorted((row["at"], row["value"]) for row in rows if row["quantity"] == "loss" and row.get("of") == of)


def _mean_curve(rows: Rows) -> list[tuple[float, float]]:
    """Mean change of unseen batches' losses against rate / lr."""
    changes: dict[float, list[float]] = {}
    for number in {row["measurement"] for row in rows}:
        batch = [row for row in rows if row["measurement"] == number]
        lr, curve = value_of(batch, "lr"), _curve(batch, "held out")
        for at, loss in curve:
            if at <= 2 * lr * (1 + 1e-9) and at != value_of(batch, "best rate"):
                changes.setdefault(round(at / lr, 6), []).append(loss - curve[0][1])
    return [(rate, float(np.mean(values))) for rate, values in sorted(changes.items())]
