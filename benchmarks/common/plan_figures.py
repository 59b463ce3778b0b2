"""The figure of a study of a plan: its losses and its endpoint, or its trials so far."""

from __future__ import annotations

import math
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.plans import Kept
from lightning_modules.report.drawing import legend_beside
from lightning_modules.report.page import new_figure
from lightning_modules.report.study.averages import AVERAGES, averages_figures
from lightning_modules.report.study.curves import has_logarithm, plot_runs
from lightning_modules.report.study.rates import rate_figures
from lightning_modules.report.study.seeds import draw_values
from lightning_modules.report.style import GREY

_DECADE = 10
_ABOVE = 1.2  # times the median loss of the first epochs
_MARGIN = 0.05  # of the axis
_ROW = 0.26  # inches, of a method beside its seeds


def study_figure(kept: Kept) -> Figure:
    """Losses by epoch, sharpness where it was measured, and the endpoint; or averages; or rates that were swept.

    Before the end it is all trials.

    Args:
        kept: A study that has a figure.
    """
    if not kept.finished:
        return _trials_figure(kept)
    files = kept.files
    if averages := averages_figures(files):
        return averages[AVERAGES][0]
    if kept.swept_alone:
        return rate_figures(files)["learning-rates"][0]
    figure, (losses, *middle, ends) = new_figure(3 if kept.sharpness else 2)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, max(height, 0.7 + _ROW * len(files.methods)))
    curves = []
    for method, style in files.styles.items():
        if runs := kept.curves(method):
            plot_runs(losses, style, "epoch", runs)
            curves += runs.values()
    losses.set(xlabel="epoch", ylabel="training loss, mean of each epoch")
    losses.xaxis.set_major_locator(MaxNLocator(integer=True))
    most = _ABOVE * median(curve[0][1] for curve in curves)  # what diverged would flatten the rest
    low, high = losses.get_ylim()
    if high > most:
        least = min(value for curve in curves for _, value in curve if math.isfinite(value))
        low, high = least - _MARGIN * (most - least), most
        losses.set_ylim(low, high)
    if has_logarithm(losses) and not 0 < high < _DECADE * low:  # in less than a decade, a logarithm has few numbers
        losses.set_yscale("log")
    if losses.get_xlim()[1] > _DECADE * min(map(len, curves)):
        losses.set_xscale("log")
    for axes in middle:
        _draw_sharpness(axes, kept)
    measure = files.endpoint
    draw_values(ends, files, measure, read_outs=("last",))
    base = kept.entries.get((measure.column, files.base), {"mean": math.nan})
    ends.axvline(measure.factor * base["mean"], color=GREY, linewidth=0.7, zorder=1)
    legend_beside(figure, losses)
    return figure


def _draw_sharpness(axes: Axes, kept: Kept) -> None:
    """The largest eigenvalue along the first run of each method, over the limit of undamped steps at its rate."""
    for method, rows in kept.sharpness.items():
        style, last = kept.files.styles[method], max(row["step"] for row in rows)
        x, y = zip(*((100 * row["step"] / max(1, last), row["lambda_1"] / row["limit"]) for row in rows), strict=True)
        axes.plot(x, y, marker=".", color=style.color, linestyle=style.line, label=f"_{style.label}", gid=style.label)
    axes.axhline(1, color="black", linewidth=0.8, label="_limit")
    axes.set(xlabel="% of the run", ylabel="largest eigenvalue over (2 + 2β) / lr", yscale="log")


def _trials_figure(kept: Kept) -> Figure:
    """Every trial at its rate, those that learned nothing left out where it is known what that is."""
    figure, _ = rate_figures(kept.files)["trials"]
    (axes,) = figure.axes
    if math.isfinite(kept.chance):
        axes.set(yscale="linear", ylim=(0, 1.1 * kept.chance))
        axes.axhline(kept.chance, color="black", linestyle=":", linewidth=1)
        axes.set_title("dotted: no better than chance", fontsize=8, loc="left")
    return figure
