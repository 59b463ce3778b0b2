"""The valley walk: the figure, its caption, and what the page says first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_modules.report.measurements.numbers import ONE_POINT, columns, finite, measured_by, values_of
from lightning_modules.report.page import new_figure
from lightning_modules.report.style import COLORS, GREY
from lightning_modules.report.verdicts import NOT_RESOLVED, correlation, interval_words, side, spread
from lightning_modules.support import quantities
from lightning_modules.support.files import Rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_valley(rows: Rows) -> tuple[Figure, str]:
    """The loss along consecutive steps with the valley's floor, and where that was predicted; with the caption."""
    bursts = measured_by(rows)
    shown = bursts if len(bursts) <= 3 else [bursts[0], bursts[len(bursts) // 2], bursts[-1]]
    figure, panels = new_figure(len(shown) + 1)
    for axes, burst in zip(panels, shown, strict=False):
        losses = [row for row in burst if row["quantity"] == quantities.LOSS]
        steps = [row["step"] for row in burst if row["quantity"] == quantities.POSITION]
        floors = zip(steps, values_of(burst, quantities.POSITION), values_of(burst, quantities.FLOOR), strict=True)
        inside = [(step + position, floor) for step, position, floor in floors if 0 <= position <= 1]
        path = [(row["step"] + row["at"], row["value"]) for row in losses]
        iterates = [(row["step"] + row["at"], row["value"]) for row in losses if row["at"] == 0]
        axes.plot(*columns(path), color=COLORS[0], linewidth=1.1, label="loss between iterates")
        axes.plot(*columns(iterates), "o", color=COLORS[0], markersize=3)
        axes.plot(*columns(inside), "--", color=COLORS[1], linewidth=1.2, label="floor, where it lies inside a step")
        axes.set(xlabel="optimizer steps", title=f"from step {steps[0]}" if steps else "")
    panels[0].set_ylabel("loss on the evaluation samples")
    panels[0].legend(frameon=False, fontsize=8)
    predicted = np.clip(values_of(rows, quantities.PREDICTED_POSITION), -1, 4)
    measured = np.clip(values_of(rows, quantities.POSITION), -1, 4)
    panels[-1].plot(predicted, measured, "o", color=COLORS[0], markersize=3, alpha=0.6)
    panels[-1].plot([-1, 4], [-1, 4], color=GREY, linewidth=0.8)
    panels[-1].set(xlabel="floor predicted by a quadratic, in steps", ylabel="floor measured, cut to -1 ... 4")
    return figure, _caption(rows)


def summarize_valley(rows: Rows) -> str:
    """One sentence: how many steps cross the valley."""
    crossings = _crossings(rows)
    if crossings.steps == 1:
        return f"Valley: one step was measured, that after {rows[0]['step']}; {ONE_POINT}."
    return (
        f"Valley: the floor lies between the ends of {crossings.inside} of {crossings.steps} steps"
        f"{crossings.interval}. That most steps cross the valley is {crossings.verdict} by this run."
    )


BURSTS = {
    "steps": "steps",
    "crossed": "barriers crossed",
    "along": "barriers along the floor",
    "height": "mean height",
    "cosine": "mean cosine of gradients",
    "distance": "distance from the start",
}


def bursts(rows: Rows) -> Rows:
    """A row for each burst of steps in a row: the step that it begins after, and what ``BURSTS`` names."""
    return [_burst(burst) for burst in measured_by(rows) if len(values_of(burst, quantities.HEIGHT))]


def _burst(rows: Rows) -> dict[str, Any]:
    heights, cosines = (finite(values_of(rows, name)) for name in (quantities.HEIGHT, quantities.COSINE))
    return {
        "step": min(row["step"] for row in rows),
        "steps": len(values_of(rows, quantities.HEIGHT)),
        "crossed": int((values_of(rows, quantities.BARRIER) > 0).sum()),
        "along": int((values_of(rows, quantities.FLOOR_BARRIER) > 0).sum()),
        "height": float(heights.mean()) if len(heights) else math.nan,
        "cosine": float(cosines.mean()) if len(cosines) else math.nan,
        "distance": float(values_of(rows, quantities.DISTANCE)[-1]),
    }


def burst_cells(burst: Mapping[str, Any]) -> list[str]:
    """What a table shows of a burst, under the names of ``BURSTS``."""
    return [f"{burst[name]:.3g}" if math.isfinite(burst[name]) else "" for name in BURSTS]


def valley_table(rows: Rows) -> dict[str, Any]:
    """A row for each burst of steps: barriers, height, and how far it is from the start."""
    body = [[f"{burst['step']}", *burst_cells(burst)] for burst in bursts(rows)]
    return {"title": "The valley, burst by burst", "header": ["from step", *BURSTS.values()], "rows": body}


@dataclass(frozen=True)
class _Crossings:
    """Steps whose ends lie on both sides of the floor."""

    inside: int
    steps: int
    interval: str  # of their share, in words
    verdict: str  # on whether they are more than half


def _crossings(rows: Rows) -> _Crossings:
    from scipy import stats  # takes a second

    positions = values_of(rows, quantities.POSITION)
    inside, steps = int(((positions > 0) & (positions < 1)).sum()), len(positions)
    if steps == 0:
        return _Crossings(inside, steps, "", NOT_RESOLVED)
    share = stats.binomtest(inside, steps).proportion_ci(method="wilson")
    return _Crossings(inside, steps, interval_words(share), side(share.low - 0.5, share.high - 0.5))


def _caption(rows: Rows) -> str:
    crossings = _crossings(rows)
    verdict = (
        "The loss along each step, and the valley's floor. That most steps cross the valley, with the floor between "
        f"their ends, is {crossings.verdict} by this run"
    )
    if crossings.steps == 1:
        return f"{verdict}; {ONE_POINT}."
    positions, barriers = values_of(rows, quantities.POSITION), values_of(rows, quantities.BARRIER)
    floor = [row["value"] for row in rows if row["quantity"] == quantities.FLOOR_BARRIER]
    agreement = correlation(values_of(rows, quantities.PREDICTED_POSITION), positions)
    middle = float(np.median(finite(positions))) if len(finite(positions)) else math.nan
    return (
        f"{verdict}: it lies inside {crossings.inside} of {crossings.steps} steps{crossings.interval}. The median "
        f"floor lies at {middle:.2g} of a step (one half is what any stationary run shows, with or without a valley); "
        f"a quadratic predicts it with rank correlation {agreement:.2f}. {int((barriers > 0).sum())} steps cross a "
        f"barrier; along the floor there are {len(floor)}{f', of mean height {np.mean(floor):.2g}' if floor else ''}. "
        f"Mean height above the floor {spread(finite(values_of(rows, quantities.HEIGHT)))}; cosine of consecutive "
        f"gradients {spread(finite(values_of(rows, quantities.COSINE)))}."
    )
