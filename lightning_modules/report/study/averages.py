"""Averages at several settings, and beside each the runs under the schedule that it is predicted to equal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_modules.report.drawing import legend_beside
from lightning_modules.report.page import new_figure
from lightning_modules.report.study.files import Files
from lightning_modules.report.study.numbers import MISSING, change_in_words, mean_of, over_pairs, seeds_of, upper
from lightning_modules.report.study.tables import shown_measures
from lightning_modules.support.paired import Change, paired_change
from lightning_modules.support.read_outs import KINDS, READ_OUTS, Average, average
from lightning_modules.support.score import Measure

AVERAGES = "averages"  # name of the figure

WORDS = (
    "An average of the weights along a run is predicted to equal, to first order in rate times curvature, the last "
    "weights of a run whose rate falls by the share of the average that lies ahead of each step (Sandler et al. 2023, "
    "arXiv 2301.02312): for SWA a straight line to zero over its window, for EMA an exponential, for two points half "
    "the rate between them. Changes are over paired seeds, with the 95 % interval of each alone; that none is shown is "
    "no proof that two are equal."
)
_AXES = {
    "ema": "EMA: steps averaged over, 1 / (1 - decay)",
    "swa": "SWA: share of the steps, %",
    "two-point": "two points: steps between them",
}


def stand_ins(files: Files) -> dict[tuple[str, str], str]:
    """By method and average of it: the method that is trained as that one is, under the average's schedule."""
    found = {}
    for method in files.methods:
        equals = files.styles[method].equals
        if equals is not None and files.settings[equals["method"]] == files.settings[method]:
            found[equals["method"], equals["read_out"]] = method
    return found


def averages_by_method(files: Files) -> dict[str, list[Average]]:
    """The averages of each method that was read out at other settings than all are, in the order of the study."""
    found: dict[str, list[Average]] = {}
    for method in files.methods:
        names = dict.fromkeys(row["read_out"] for row in files.results if row["method"] == method)
        if more := [average(name) for name in names if name not in READ_OUTS]:
            found[method] = more
    return found


def averages_tables(files: Files) -> list[dict[str, Any]]:
    """For the endpoint and what is beside it, a row for each average: its mean and that of its schedule's runs."""
    read = averages_by_method(files)
    return [_table(files, measure, read) for measure in shown_measures(files)] if read else []


def _table(files: Files, measure: Measure, read: dict[str, list[Average]]) -> dict[str, Any]:
    entries = {(entry["method"], entry["read_out"]): entry for entry in files.entries(measure.column)}
    beside = stand_ins(files)
    rows = []
    for method, averages in read.items():
        rows.append([files.label(method), "last weights", _mean(entries.get((method, "last")), measure), "", "", ""])
        for one in averages:
            gain = _change(files, measure, (method, one.name), (method, "last"))
            row = ["", one.label, _mean(entries.get((method, one.name)), measure), gain]
            other = beside.get((method, one.name))
            if other is None:
                rows.append([*row, "", ""])
                continue
            change = _change(files, measure, (other, "last"), (method, one.name))
            rows.append([*row, _mean(entries.get((other, "last")), measure), change])
    by = "over" if files.effect(measure) == "ratio" else "minus"
    return {
        "title": f"{upper(measure.header)}: averages of a run, and runs under the schedules that they are to equal",
        "header": ["method", "weights", "mean", f"{by} last weights", "under its schedule", f"that {by} the average"],
        "rows": rows,
    }


def _mean(entry: dict[str, Any] | None, measure: Measure) -> str:
    if entry is None:
        return MISSING
    return "\n".join(filter(None, [mean_of(entry, measure), seeds_of(entry)]))


def _change(files: Files, measure: Measure, own: tuple[str, str], reference: tuple[str, str]) -> str:
    """The change between two read-outs over paired seeds."""
    values = files.values(*own, measure)
    change: Change = paired_change(values, files.values(*reference, measure), files.effect(measure))
    if not change.pairs:
        return MISSING
    words = change_in_words(change.mean, files.effect(measure), measure, words=False)
    return words + over_pairs(change.pairs, len(values))


# -- the figure ----------------------------------------------------------------------------------------------------


def averages_figures(files: Files) -> dict[str, tuple[Figure, str]]:
    """Name to figure and caption: the endpoint against decay, share and spacing; none of a study without averages."""
    read = averages_by_method(files)
    kinds = [kind for kind in KINDS if any(one.kind == kind for averages in read.values() for one in averages)]
    if not kinds:
        return {}
    figure, panels = new_figure(len(kinds))
    measure = files.endpoint
    for axes, kind in zip(panels, kinds, strict=True):
        for method, averages in read.items():
            _draw(axes, files, method, [one for one in averages if one.kind == kind])
        axes.set(xlabel=_AXES[kind], xscale="linear" if kind == "swa" else "log")
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for axes in panels for line in axes.get_lines()])
    if files.effect(measure) == "ratio" and drawn.max() > 10 * drawn.min() > 0:  # else a logarithm has few numbers
        for axes in panels:
            axes.set_yscale("log")
    ends = [axes.get_ylim() for axes in panels]
    for axes in panels:
        axes.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))
    panels[0].set_ylabel(measure.header)
    legend_beside(figure, panels[0])
    words = (
        f"{upper(measure.label)} of averages by their settings, of runs under the schedules that they are predicted to "
        "equal, and of the last weights: means over seeds with 95 % intervals."
    )
    return {AVERAGES: (figure, words)}


def _draw(axes: Axes, files: Files, method: str, averages: list[Average]) -> None:
    """Of one method and one kind: averages joined by a line, runs under their schedules as squares, last weights."""
    entries = {(entry["method"], entry["read_out"]): entry for entry in files.entries(files.endpoint.column)}
    ordered = sorted(averages, key=_place)
    beside, label = stand_ins(files), files.label(method)
    own = [(_place(one), entries.get((method, one.name))) for one in ordered]
    others = [(_place(one), beside.get((method, one.name))) for one in ordered]
    real = [(x, None if other is None else entries.get((other, "last"))) for x, other in others]
    _points(axes, files, method, f"averages of {label}", own, marker="o", line="-")
    _points(axes, files, method, f"{label} under their schedules", real, marker="s", line="")
    last = entries.get((method, "last"))
    if last is not None and math.isfinite(last["mean"]):
        name = f"last weights of {label}"
        level, color = files.endpoint.factor * last["mean"], files.styles[method].color
        axes.axhline(level, color=color, linestyle=":", linewidth=1, label=name, gid=name)


def _place(one: Average) -> float:
    """Where an average stands in its panel."""
    if one.kind == "ema":
        return 1 / (1 - one.value)
    return 100 * one.value if one.kind == "swa" else one.value


def _points(
    axes: Axes,
    files: Files,
    method: str,
    name: str,
    points: list[tuple[float, dict[str, Any] | None]],
    *,
    marker: str,
    line: str,
) -> None:
    """Means where there are any, with their intervals behind them."""
    there = [(x, entry) for x, entry in points if entry is not None and math.isfinite(entry["mean"])]
    factor, color = files.endpoint.factor, files.styles[method].color
    look: dict[str, Any] = {"color": color, "markerfacecolor": "white" if marker == "s" else color, "markersize": 5}
    means = [factor * entry["mean"] for _, entry in there]
    axes.plot([x for x, _ in there], means, marker=marker, linestyle=line, label=name, gid=name, zorder=3, **look)
    for x, entry in there:
        if math.isfinite(entry["high"]):
            ends = [factor * entry["low"], factor * entry["high"]]
            axes.plot([x, x], ends, color=color, linewidth=1, label=f"_{name} {x:g}", gid=name)
