"""Averages as schedules: the figure, its caption, and what the page says first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_modules.report.measurements.numbers import columns, value_of, values_of
from lightning_modules.report.page import new_figure
from lightning_modules.report.style import COLORS
from lightning_modules.report.verdicts import CONFIRMED, NOT_CONFIRMED, NOT_RESOLVED
from lightning_modules.support import quantities
from lightning_modules.support.files import Rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_averaging(rows: Rows) -> tuple[Figure, str]:
    """Losses and distances of averages and schedules, and what two points gain; with the caption."""
    figure, (losses, gains, distances) = new_figure(3)
    averages = _averages(rows)
    schedules = [quantities.schedule_of(name) for name in averages]
    for shift, names, style, color, label in (
        (-0.1, averages, "o", COLORS[0], "average"),
        (0.1, schedules, "s", COLORS[1], "schedule"),
    ):
        values = [(place + shift, value_of(rows, quantities.LOSS, of=name)) for place, name in enumerate(names)]
        losses.plot(*columns(values), style, color=color, markersize=7, label=label)
    last = value_of(rows, quantities.LOSS, of=quantities.LAST)
    losses.plot(*columns([(-0.3, last), (len(averages) - 0.7, last)]), "--", color="black", label="last iterate")
    losses.set_xticks(range(len(averages)), averages)
    losses.set_ylabel("loss on the evaluation samples")
    losses.margins(x=0.1, y=0.35)
    losses.legend(frameon=False, fontsize=8, loc="upper left")
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
    return figure, _caption(rows, averages)


def summarize_averaging(rows: Rows) -> str:
    """One sentence: the lowest average beside the last iterate, and whether averages are where schedules lead."""
    averages = _averages(rows)
    best = min(averages, key=lambda name: value_of(rows, quantities.LOSS, of=name))
    loss, last = (value_of(rows, quantities.LOSS, of=name) for name in (best, quantities.LAST))
    return (
        f"Averaging, from one start: of {', '.join(averages)} the lowest loss is that of {best}, {loss:.3g}; the last "
        f"iterate has {last:.3g}. That averages are where their schedules lead is "
        f"{_verdict(_ratios(rows, averages))} by this run."
    )


def _averages(rows: Rows) -> list[str]:
    return [row["of"] for row in rows if row["quantity"] == quantities.SCHEDULE_DISTANCE]


def _ratios(rows: Rows, averages: Sequence[str]) -> list[float]:
    """The distance to which each schedule leads from its average, as a share of the way to the last iterate.

    NaN where nothing has moved, as at a rate of 0.
    """
    distances = [
        (value_of(rows, quantities.SCHEDULE_DISTANCE, of=name), value_of(rows, quantities.LAST_DISTANCE, of=name))
        for name in averages
    ]
    return [distance / way if way else math.nan for distance, way in distances]


def _verdict(ratios: Sequence[float]) -> str:
    largest = max(ratios)
    if not all(map(math.isfinite, ratios)):
        return NOT_RESOLVED
    return CONFIRMED if largest < 0.5 else NOT_CONFIRMED if largest >= 1 else NOT_RESOLVED


def _caption(rows: Rows, averages: Sequence[str]) -> str:
    ratios = _ratios(rows, averages)
    words = "; ".join(
        f"{name} {value_of(rows, quantities.LOSS, of=name):.3g} against "
        f"{value_of(rows, quantities.LOSS, of=quantities.schedule_of(name)):.3g}, "
        f"{'where nothing moved' if math.isnan(ratio) else f'{ratio:.2f} of the way to the last iterate'}"
        for name, ratio in zip(averages, ratios, strict=True)
    )
    gains = [(row["at"], row["value"]) for row in rows if row["quantity"] == quantities.TWO_POINT_GAIN]
    spacing, gain = max(gains, key=lambda point: point[1])
    return (
        f"From the last weights, SGD at lr {value_of(rows, quantities.LR):.3g}: its averages, and the last iterates "
        "under the schedules that they equal to first order. That an average is where its schedule leads is "
        f"{_verdict(ratios)} by this run: loss of average against schedule, and the distance between them, are "
        f"{words}. The last iterate's loss is {value_of(rows, quantities.LOSS, of=quantities.LAST):.3g}. Averaging two "
        f"points gains most, {gain:.2g}, {spacing:g} steps apart."
    )
