"""Averages as schedules: the figure, its caption, and what the page says first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lightning_modules.report.measurements.numbers import columns, measured_by, value_of, values_of
from lightning_modules.report.page import new_figure
from lightning_modules.report.style import COLORS, GREY
from lightning_modules.report.verdicts import CONFIRMED, NOT_CONFIRMED, NOT_RESOLVED, Numbers, spread
from lightning_modules.support import quantities
from lightning_modules.support.files import Rows
from lightning_modules.support.paired import t_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARGIN = 0.25  # of what averaging changes in a run: a schedule that is so near its average counts as equal

_DIVERGED = (
    "training had diverged, and nothing was measured; that an average has the loss of the schedule that it equals on a "
    f"quadratic is {NOT_RESOLVED} by this run"
)


@dataclass(frozen=True)
class Pair:
    """Losses of an average, of its schedule and of the last iterate, an entry for each replicate, (n,)."""

    name: str
    average: Numbers
    schedule: Numbers
    last: Numbers

    @property
    def difference(self) -> Numbers:
        """Of the schedule from the average."""
        return self.schedule - self.average

    @property
    def margin(self) -> float:
        """The mean difference that counts as none: a share of how far averaging takes the last iterate's loss.

        Root mean square over the replicates, for the mean may be 0 where single runs are far from it.
        """
        return MARGIN * float(np.sqrt(np.mean((self.last - self.average) ** 2)))

    def verdict(self, *, compared: int) -> str:
        """Whether the mean difference is inside of the margin, by t-intervals over the replicates.

        Confirmed where the 95 % interval lies inside (two tests, one for each side, Schuirmann 1987). Not confirmed
        where an interval lies outside whose level goes by the averages compared (Bonferroni).
        """
        low, high = t_interval(list(self.difference))
        if -self.margin < low and high < self.margin:
            return CONFIRMED
        low, high = t_interval(list(self.difference), level=1 - 0.05 / compared)
        return NOT_CONFIRMED if low > self.margin or high < -self.margin else NOT_RESOLVED


def draw_averaging(rows: Rows) -> tuple[Figure, str]:
    """Averages beside schedules, losses over the time scales, and what two points gain; with the caption."""
    figure, (losses, differences, windows, spacings, gains, distances) = new_figure(3, rows=2)
    pairs = _pairs(rows)
    places, names = range(len(pairs)), [pair.name for pair in pairs]
    for shift, style, color, label in ((-0.1, "o", COLORS[0], "average"), (0.1, "s", COLORS[1], "schedule")):
        values = [pair.average if label == "average" else pair.schedule for pair in pairs]
        _bars(losses, [place + shift for place in places], values, style, color, label)
    last = _losses(rows, quantities.LAST)
    if pairs:
        losses.plot(*columns([(-0.3, _mean(last)), (len(pairs) - 0.7, _mean(last))]), "--", color="black", label="last")
    losses.set_ylabel("loss on the evaluation samples")
    losses.margins(x=0.1, y=0.35)
    losses.legend(frameon=False, fontsize=8, loc="upper left")
    for sign in (1, -1):
        x, y = columns([(place, sign * pair.margin) for place, pair in enumerate(pairs)])
        differences.bar(x, y, width=0.6, color=GREY, alpha=0.3, label="counts as equal" if sign > 0 else None)
    _bars(differences, list(places), [pair.difference for pair in pairs], "o", COLORS[0], "measured")
    differences.axhline(0, color=GREY, linewidth=0.8)
    differences.margins(y=0.3)
    differences.legend(frameon=False, fontsize=8, loc="upper left")
    differences.set_ylabel("loss of schedule − loss of average")
    for axes in (losses, differences):
        axes.set_xticks(places, names, fontsize=8)
    for axes, kind, words in (
        (windows, quantities.WINDOW, "last iterates in the mean"),
        (spacings, quantities.SPACING, "steps between the two points"),
    ):
        _draw_scale(axes, rows, kind, last)
        axes.set(xlabel=words, ylabel="loss on the evaluation samples")
    curves = (
        (gains, quantities.TWO_POINT_GAIN, "measured", "o-", COLORS[0]),
        (gains, quantities.PREDICTED_TWO_POINT_GAIN, "predicted, Δᵀ H Δ / 8", "x--", COLORS[1]),
        (distances, quantities.SQUARED_DISTANCE, "measured", "o-", COLORS[0]),
    )
    for axes, quantity, label, style, color in curves:
        points = [(row["at"], row["value"]) for row in rows if row["quantity"] == quantity]
        axes.plot(*columns(points), style, color=color, label=label)
        axes.set(xlabel="steps between the two points", xscale="log")
    gains.set_ylabel("loss saved by averaging two points")
    gains.legend(frameon=False, fontsize=8)
    apart = bool((values_of(rows, quantities.SQUARED_DISTANCE) > 0).any())  # not at a rate of 0
    distances.set(ylabel="squared distance of the two points", yscale="log" if apart else "linear")
    return figure, _caption(rows, pairs)


def summarize_averaging(rows: Rows) -> str:
    """One sentence: the lowest average beside the last iterate, and whether averages are what schedules give."""
    pairs = _pairs(rows)
    if not pairs:
        return f"Averaging: {_DIVERGED}."
    best = min(pairs, key=lambda pair: _mean(pair.average))
    return (
        f"Averaging, from one start: of {', '.join(pair.name for pair in pairs)} the lowest mean loss is that of "
        f"{best.name}, {_mean(best.average):.3g}; the last iterate has {_mean(best.last):.3g}. That an average has the "
        f"loss of the schedule that it equals on a quadratic is {_verdict(pairs)} by this run."
    )


def _losses(rows: Rows, of: str, at: float | None = None) -> Numbers:
    """Of something in each replicate, (n,); NaN where one is not finite."""
    found = [
        row["value"] if np.isfinite(row["value"]) else np.nan
        for row in rows
        if row["quantity"] == quantities.LOSS and row.get("of") == of and at in (None, row.get("at"))
    ]
    return np.array(found, dtype=float)


def _pairs(rows: Rows) -> list[Pair]:
    """Averages that have a schedule beside them, over the replicates that have all of it."""
    found = dict.fromkeys(row["of"] for row in rows if row["quantity"] == quantities.LOSS)
    names = [name for name in found if quantities.schedule_of(name) in found]
    needed = {quantities.LAST, *names, *map(quantities.schedule_of, names)}
    whole = [
        row
        for replicate in measured_by(rows)
        if needed <= {row.get("of") for row in replicate if row["quantity"] == quantities.LOSS}
        for row in replicate
    ]
    last = _losses(whole, quantities.LAST)
    return [Pair(name, _losses(whole, name), _losses(whole, quantities.schedule_of(name)), last) for name in names]


def _verdict(pairs: Sequence[Pair]) -> str:
    """On all averages together: every one has to be confirmed, and one that is not is enough."""
    verdicts = {pair.verdict(compared=len(pairs)) for pair in pairs}
    return NOT_CONFIRMED if NOT_CONFIRMED in verdicts else CONFIRMED if verdicts == {CONFIRMED} else NOT_RESOLVED


def _mean(values: Numbers) -> float:
    return float(np.mean(values))


def _bars(axes: Axes, at: Sequence[float], values: Sequence[Numbers], style: str, color: str, label: str) -> None:
    """Means over the replicates with their 95 % intervals, where there are some."""
    x, y = columns([(place, _mean(of)) for place, of in zip(at, values, strict=True)])
    half = [(high - low) / 2 for low, high in (t_interval(list(of)) for of in values)]
    axes.errorbar(x, y, [h if np.isfinite(h) else 0 for h in half], fmt=style, color=color, capsize=3, label=label)


def _draw_scale(axes: Axes, rows: Rows, kind: str, last: Numbers) -> None:
    """Mean losses over windows or spacings, the model's beside the measured ones."""
    ats = sorted({row["at"] for row in rows if row["quantity"] == quantities.LOSS and row.get("of") == kind})
    _bars(axes, ats, [_losses(rows, kind, at) for at in ats], "o-", COLORS[0], "measured")
    points = [(at, value_of(rows, quantities.PREDICTED_LOSS, of=kind, at=at)) for at in ats]
    axes.plot(*columns(points), "x--", color=COLORS[1], label="predicted by the model")
    if ats:
        axes.plot(*columns([(ats[0], _mean(last)), (ats[-1], _mean(last))]), "--", color="black", label="last")
    axes.set_xscale("log")
    axes.set_xticks(ats, [f"{at:g}" for at in ats])
    axes.set_xticks([], minor=True)
    axes.margins(y=0.3)
    axes.legend(frameon=False, fontsize=8)


def _caption(rows: Rows, pairs: Sequence[Pair]) -> str:
    if not pairs:
        return f"Averages beside schedules: {_DIVERGED}."
    count = len(pairs[0].last)
    words = "; ".join(
        f"{pair.name} {_mean(pair.average):.3g} against {_mean(pair.schedule):.3g}, difference "
        f"{spread(pair.difference)}, {pair.verdict(compared=len(pairs))}"
        for pair in pairs
    )
    gains = [(row["at"], row["value"]) for row in rows if row["quantity"] == quantities.TWO_POINT_GAIN]
    gain = ""
    if gains:  # none where the loss was not finite
        spacing, most = max(gains, key=lambda point: point[1])
        gain = f" Below, in the first of them: averaging two points gains most, {most:.2g}, {spacing:g} steps apart."
    sharp = sum(row["quantity"] == quantities.CURVATURE for row in rows) - 1
    lr = value_of(rows, quantities.LR)
    return (
        f"From the last weights, SGD at lr {lr:.3g}, {count} times on batches of their own: its averages, and on the "
        "same batches the last iterates under the schedules that they equal on a quadratic. That an average has the "
        f"mean loss of its schedule is {_verdict(pairs)} by this run (the mean difference within {MARGIN:g} "
        "of what averaging changes in a run, root mean square, by 95 % t-intervals over the replicates"
        f"{_alone(count)}): {words}. The last iterate "
        f"has {_mean(pairs[0].last):.3g}. Windows and spacings: mean losses, and those that the model predicts from "
        f"the start.{gain} Assumed: a quadratic loss with one Hessian for every batch, and independent batches of one "
        f"noise; the curvature is exact along the {sharp} sharpest directions, and one number, "
        f"{value_of(rows, quantities.CURVATURE, of=quantities.REST):.2g}, in all the rest."
    )


def _alone(count: int) -> str:
    return ", of which one gives none" if count == 1 else ""
