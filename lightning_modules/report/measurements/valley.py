"""The figure and the caption of the valley walk."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from lightning_modules.report.measurements.numbers import columns, finite, values_of
from lightning_modules.report.page import new_figure
from lightning_modules.report.style import COLORS, GREY
from lightning_modules.report.verdicts import NOT_RESOLVED, correlation, interval_words, side, spread
from lightning_modules.support.files import Rows


def draw_valley(rows: Rows) -> tuple[Figure, str]:
    """The loss along consecutive steps with the valley's floor, and where that was predicted; with the caption."""
    bursts = sorted({row["measurement"] for row in rows})
    shown = bursts if len(bursts) <= 3 else [bursts[0], bursts[len(bursts) // 2], bursts[-1]]
    figure, panels = new_figure(len(shown) + 1)
    for axes, burst in zip(panels, shown, strict=False):
        own = [row for row in rows if row["measurement"] == burst]
        path = [(row["step"] + row["at"], row["value"]) for row in own if row["quantity"] == "loss"]
        floors = list(zip(values_of(own, "position"), values_of(own, "floor"), strict=True))
        steps = [row["step"] for row in own if row["quantity"] == "position"]
        inside = [(s + p, f) for s, (p, f) in zip(steps, floors, strict=True) if 0 <= p <= 1]
        ends = [(row["step"] + row["at"], row["value"]) for row in own if row["quantity"] == "loss" and row["at"] == 0]
        axes.plot(*columns(path), color=COLORS[0], linewidth=1.1, label="loss between iterates")
        axes.plot(*columns(ends), "o", color=COLORS[0], markersize=3)
        axes.plot(*columns(inside), "--", color=COLORS[1], linewidth=1.2, label="floor, where it lies inside a step")
        axes.set(xlabel="optimizer steps", title=f"from step {steps[0]}" if steps else "")
    panels[0].set_ylabel("loss on the evaluation samples")
    panels[0].legend(frameon=False, fontsize=8)
    predicted, measured = values_of(rows, "predicted position"), values_of(rows, "position")
    panels[-1].plot(np.clip(predicted, -1, 4), np.clip(measured, -1, 4), "o", color=COLORS[0], markersize=3, alpha=0.6)
    panels[-1].plot([-1, 4], [-1, 4], color=GREY, linewidth=0.8)
    panels[-1].set(xlabel="floor predicted by a quadratic, in steps", ylabel="floor measured, cut to -1 ... 4")
    return figure, _valley_caption(rows)


def _valley_caption(rows: Rows) -> str:
    positions, barriers = values_of(rows, "position"), values_of(rows, "barrier")
    inside = int(((positions > 0) & (positions < 1)).sum())
    share = stats.binomtest(inside, len(positions)).proportion_ci(method="wilson") if len(positions) else None
    verdict = side(share.low - 0.5, share.high - 0.5) if share else NOT_RESOLVED
    cosines = finite(values_of(rows, "cosine"))
    floor = [row["value"] for row in rows if row["quantity"] == "floor barrier"]
    agreement = correlation(values_of(rows, "predicted position"), positions)
    middle = float(np.median(finite(positions))) if len(finite(positions)) else math.nan
    return (
        "The loss along each step, and the valley's floor. That most steps cross the valley, with the floor between "
        f"their ends, is {verdict} by this run: it lies inside {inside} of {len(positions)} steps"
        f"{interval_words(share)}. The median floor lies at {middle:.2g} of a step (one half is what any stationary "
        f"run shows, with or without a valley); a quadratic predicts it with rank correlation {agreement:.2f}. "
        f"{int((barriers > 0).sum())} steps cross a barrier; along the floor there are {len(floor)}"
        f"{f', of mean height {np.mean(floor):.2g}' if floor else ''}. Mean height above the floor "
        f"{spread(finite(values_of(rows, 'height')))}; cosine of consecutive gradients {spread(cosines)}."
    )
