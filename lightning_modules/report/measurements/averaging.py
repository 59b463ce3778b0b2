"""The figure and the caption of averages as schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from lightning_modules.report.measurements.numbers import columns, value_of
from lightning_modules.report.page import new_figure
from lightning_modules.report.style import COLORS
from lightning_modules.report.verdicts import CONFIRMED, NOT_CONFIRMED, NOT_RESOLVED
from lightning_modules.support.files import Rows


def draw_averaging(rows: Rows) -> tuple[Figure, str]:
    """Losses and distances of averages and schedules, and what two points gain; with the caption."""
    figure, (losses, gains, distances) = new_figure(3)
    names = [row["of"] for row in rows if row["quantity"] == "distance of average and schedule"]
    for shift, suffix, style, color, label in (
        (-0.1, "", "o", COLORS[0], "average"),
        (0.1, ", schedule", "s", COLORS[1], "schedule"),
    ):
        values = [(place + shift, value_of(rows, "loss", of=f"{name}{suffix}")) for place, name in enumerate(names)]
        losses.plot(*columns(values), style, color=color, markersize=7, label=label)
    last = value_of(rows, "loss", of="last")
    losses.plot(*columns([(-0.3, last), (len(names) - 0.7, last)]), "--", color="black", label="last iterate")
    losses.set_xticks(range(len(names)), names)
    losses.set_ylabel("loss on the evaluation samples")
    losses.margins(x=0.1, y=0.35)
    losses.legend(frameon=False, fontsize=8, loc="upper left")
    curves = (
        (gains, "two-point gain", "measured", "o-", COLORS[0]),
        (gains, "predicted two-point gain", "predicted, Δᵀ H Δ / 8", "x--", COLORS[1]),
        (distances, "squared distance", "measured", "o-", COLORS[0]),
    )
    for axes, quantity, label, style, color in curves:
        points = [(row["at"], row["value"]) for row in rows if row["quantity"] == quantity]
        axes.plot(*columns(points), style, color=color, label=label)
        axes.set(xlabel="steps between the two points", xscale="log")
    gains.set_ylabel("loss saved by averaging two points")
    gains.legend(frameon=False, fontsize=8)
    distances.set(ylabel="squared distance of the two points", yscale="log")
    return figure, _averaging_caption(rows, names)


def _averaging_caption(rows: Rows, names: Sequence[str]) -> str:
    ratios = [
        value_of(rows, "distance of average and schedule", of=name)
        / value_of(rows, "distance of average and last", of=name)
        for name in names
    ]
    largest = max(ratios)
    verdict = CONFIRMED if largest < 0.5 else NOT_CONFIRMED if largest >= 1 else NOT_RESOLVED
    if not math.isfinite(largest):
        verdict = NOT_RESOLVED
    words = "; ".join(
        f"{name} {value_of(rows, 'loss', of=name):.3g} against {value_of(rows, 'loss', of=f'{name}, schedule'):.3g}, "
        f"{ratio:.2f} of the way to the last iterate"
        for name, ratio in zip(names, ratios, strict=True)
    )
    gains = [(row["at"], row["value"]) for row in rows if row["quantity"] == "two-point gain"]
    spacing, gain = max(gains, key=lambda point: point[1])
    return (
        f"From the last weights, SGD at lr {value_of(rows, 'lr'):.3g}: its averages, and the last iterates under the "
        f"schedules that they equal to first order. That an average is where its schedule leads is {verdict} by this "
        f"run: loss of average against schedule, and the distance between them, are {words}. The last iterate's loss "
        f"is {value_of(rows, 'loss', of='last'):.3g}. Averaging two points gains most, {gain:.2g}, {spacing:g} steps "
        "apart."
    )
