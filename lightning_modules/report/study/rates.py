"""What a study's trials and its sweep say of learning rates: their tables and figures."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_modules.report.drawing import legend_beside
from lightning_modules.report.page import new_figure
from lightning_modules.report.study.curves import has_logarithm, plot
from lightning_modules.report.study.files import Files
from lightning_modules.report.study.numbers import MISSING, and_, count, estimate, settings_of, upper
from lightning_modules.support.files import Rows
from lightning_modules.support.score import TRAIN_LOSS, Measure

_NEAR = 1.1  # times the best loss that counts as near it
_ABOVE = 3  # times the loss before training: what diverged would flatten the rest of the axis
_SENSITIVITY = (
    "Training loss and {score} of the last weights against the learning rate, {runs}; other settings are those of the "
    "study. Dotted: the loss of the first batch before training. "
    "Losses that are not finite are not drawn, nor are those above {above} times the dotted line."
)


def stable_range(rows: Rows, start: float) -> tuple[float, float] | None:
    """Lowest and highest learning rate of the longest unbroken range whose final loss is below the first one.

    Args:
        rows: Of one method's sweep: ``lr`` and ``train_loss``.
        start: Loss before training.
    """
    return _longest([(row["lr"], row["train_loss"] < start) for row in rows])


def range_near_the_best(rows: Rows) -> tuple[float, float] | None:
    """Lowest and highest learning rate of the unbroken range around the best whose final losses are within a tenth.

    Args:
        rows: Of one method's sweep: ``lr`` and ``train_loss``.
    """
    finite = [row["train_loss"] for row in rows if math.isfinite(row["train_loss"])]
    best = min(finite, default=math.nan)
    holds = [(row["lr"], row["train_loss"] <= _NEAR * best) for row in rows]
    return _longest(holds)


def _longest(holds: Sequence[tuple[float, bool]]) -> tuple[float, float] | None:
    """Ends of the longest unbroken range of rates for which something holds."""
    best: list[float] = []
    current: list[float] = []
    for rate, held in sorted(holds):
        current = [*current, rate] if held else []
        best = max(best, current, key=len)
    return (best[0], best[-1]) if best else None


def means_over_seeds(rows: Rows) -> Rows:
    """One row for each learning rate of one method's sweep: means over its seeds, of which a death has no loss."""
    found: Rows = []
    for lr in sorted({row["lr"] for row in rows}):
        at = [row for row in rows if row["lr"] == lr]
        names = [name for name in dict.fromkeys(n for row in at for n in row) if _is_number(at[0].get(name))]
        found.append({name: float(np.mean([row.get(name, math.nan) for row in at])) for name in names} | {"lr": lr})
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# -- tables --------------------------------------------------------------------------------------------------------


def settings_table(files: Files) -> dict[str, Any]:
    """What each method trained with, what its learning rate did, and the trials that it comes from."""
    table = _tuned(files) if files.tuning else _given(files)
    schedules = [files.styles[method].schedule for method in files.methods]
    if any(schedules):
        table["header"].append("schedule")
        table["rows"] = [[*row, schedule] for row, schedule in zip(table["rows"], schedules, strict=True)]
    return table


def _given(files: Files) -> dict[str, Any]:
    rows = [[files.label(m), settings_of(files.settings[m])] for m in files.methods]
    return {"title": "Settings, as given", "header": ["method", "settings"], "rows": rows}


def _tuned(files: Files) -> dict[str, Any]:
    measure = files.criterion
    rows = []
    for method in files.methods:
        worse = [measure.badness(row) for row in _first_runs(files, method)]
        settings = settings_of(files.settings[method])
        if not worse:  # it takes those of the method that it gives more steps to, or has nothing to tune
            other = method.removesuffix("-more")
            whose = f"as {files.label(other)}" if other != method and other in files.styles else "none"
            rows.append([files.label(method), whose, settings, "", ""])
            continue
        settings = "\n".join(filter(None, (settings, at_the_edge(files, method))))
        median = float(np.median(worse))
        median = median if measure.lower_is_better else -median
        rows.append(
            [files.label(method), str(len(worse)), settings, _of_the_best(files, method), _printed(median, measure)]
        )
    seeds = len(_seeds(files))
    rule = ""
    if seeds > 1:
        rule = f"; the best ran again with {count(seeds - 1, 'more seed')}, and the mean decided"
    return {
        "title": f"Settings, the best of each method's trials by {measure.label}{rule}",
        "header": ["method", "trials", "settings", f"{measure.label} of the best", "of the median trial"],
        "rows": rows,
    }


def at_the_edge(files: Files, method: str) -> str:
    """Which settings of a method's chosen trial are the lowest or the highest of its trials, and what to do."""
    lost = [row for row in files.lost_trials if row["method"] == method]
    trials, chosen = [*_first_runs(files, method), *lost], _chosen_runs(files, method)
    edges = []
    for name in files.settings[method] if chosen else ():
        values = {row[name] for row in trials if name in row}
        if len(values) > 1 and files.settings[method][name] in (min(values), max(values)):
            edge = "lower" if files.settings[method][name] == min(values) else "upper"
            edges.append(f"{name} at the {edge} edge")
    return f"{', '.join(edges)} of its trials; widen search.{method}" if edges else ""


def edges(files: Files) -> list[str]:
    """A sentence on each method whose best trial is at an edge, as in the table of settings."""
    found = {method: at_the_edge(files, method) for method in files.methods}
    return [f"{files.label(method)}: {words}." for method, words in found.items() if words]


def seeds_of_trials(files: Files) -> str:
    """The seed of the trials, and those that the best ran again with."""
    more = _seeds(files)[1:]
    if not more:
        return f"seed {files.tuning_seed}"
    again = {(row["method"], row["trial"]) for row in files.tuning if row.get("seed") in more}
    most = max(sum(m == method for m, _ in again) for method in files.methods)
    seeds = f"seed{'s' if more[1:] else ''} {and_([str(seed) for seed in more])}"
    return f"seed {files.tuning_seed}, the best {most} again with {seeds}, where the mean decided"


def _seeds(files: Files) -> list[Any]:
    """Seeds of the trials, the first one first; one, unnamed, in studies of before they had several."""
    return sorted({row.get("seed", 0) for row in files.tuning})


def _first_runs(files: Files, method: str) -> Rows:
    """The trials of a method, each with the first seed."""
    first = _seeds(files)[:1]
    return [row for row in files.tuning if row["method"] == method and [row.get("seed", 0)] == first]


def _chosen_runs(files: Files, method: str) -> Rows:
    """The trial of a method that its settings come from, with every seed."""
    settings = files.settings[method]
    rows = [row for row in files.tuning if row["method"] == method]
    return [row for row in rows if all(row[name] == settings[name] for name in settings if name in row)]


def _of_the_best(files: Files, method: str) -> str:
    """What the chosen trial scored, in the mean over its seeds, and how many of these are not in it."""
    measure, seeds = files.criterion, len(_seeds(files))
    runs = _chosen_runs(files, method)
    kept = [row[measure.column] for row in runs if math.isfinite(measure.badness(row))]
    if not kept:
        return MISSING
    lost = "" if len(kept) == seeds else f"\non {len(kept)} of {seeds} seeds; diverged or died on {seeds - len(kept)}"
    return f"{_printed(float(np.mean(kept)), measure)}{lost}"


def sensitivity_table(files: Files) -> dict[str, Any]:
    """For each method the range of rates that lower the loss, the decades near its best, and the best one."""
    rows = []
    for method in files.methods:
        swept = means_over_seeds([row for row in files.sweep if row["method"] == method])
        if swept:
            near = _decades(range_near_the_best(swept), swept)
            rows.append([files.label(method), *_stability(swept), near, *_best_rate(swept, files)])
    return {
        "title": f"Learning rates that lower the loss, and the best by {files.criterion.label} with what it gives",
        "header": [
            *("method", "stable from", "to", "decades", "decades within 10 % of the best loss", "best"),
            *("training loss", files.score.validation.header),
        ],
        "rows": rows,
    }


def _stability(rows: Rows) -> list[str]:
    """Ends of the longest unbroken range of rates that lower the loss, and its decades."""
    starts = [row["start_loss"] for row in rows if "start_loss" in row]
    stable = stable_range(rows, starts[0]) if starts else None
    if stable is None:
        return [MISSING] * 3
    return [f"{stable[0]:g}", f"{stable[1]:g}", _decades(stable, rows)]


def _decades(ends: tuple[float, float] | None, rows: Rows) -> str:
    """How wide a range of rates is, at least where it ends with the rates that were tried."""
    if ends is None:
        return MISSING
    rates, (low, high) = [row["lr"] for row in rows], ends
    more = "≥ " if low == min(rates) or high == max(rates) else ""
    return f"{more}{math.log10(high / low):.2f}"


def _best_rate(rows: Sequence[Mapping[str, Any]], files: Files) -> list[str]:
    """The best rate, with training loss and score in validation there."""
    best = min(rows, key=files.criterion.badness)
    if math.isinf(files.criterion.badness(best)):
        return [MISSING] * 3
    measure = files.score.validation
    return [f"{best['lr']:g}", _printed(best["train_loss"], TRAIN_LOSS), _printed(best[measure.column], measure)]


def _printed(value: float, measure: Measure) -> str:
    return estimate(value, math.nan, measure.factor, measure.digits)


# -- figures -------------------------------------------------------------------------------------------------------


def rate_figures(files: Files) -> dict[str, tuple[Figure, str]]:
    """Name to figure and caption: of the sweep and of the trials, where there were any."""
    figures = {}
    if files.sweep:
        seeds = max(Counter((row["method"], row["lr"]) for row in files.sweep).values())  # a death has no seed there
        runs = "one run for each point, all with the same seed"
        if seeds > 1:
            runs = f"means over {seeds} seeds, which are the crosses"
        words = _SENSITIVITY.format(score=files.score.validation.label, above=_ABOVE, runs=runs)
        figures["learning-rates"] = (_sensitivity(files), words)
    if any("lr" in row for row in files.tuning):
        words = (
            f"{upper(files.criterion.label)} of every trial against its learning rate; other settings may differ too."
        )
        again = " Crosses: the best, with the other seeds." if len(_seeds(files)) > 1 else ""
        figures["trials"] = (_trials(files), f"{words}{again} What diverged is not drawn.")
    return figures


def _sensitivity(files: Files) -> Figure:
    measure = files.score.validation
    figure, (losses, scores) = new_figure(2)
    for method, style in files.styles.items():
        every = [row for row in files.sweep if row["method"] == method]
        rows = means_over_seeds(every)
        for axes, column, factor in ((losses, TRAIN_LOSS.column, 1.0), (scores, measure.column, measure.factor)):
            if rows:
                values = [factor * row.get(column, math.nan) for row in rows]
                plot(axes, style, [row["lr"] for row in rows], values, marker="o")
            if len(every) > len(rows):
                values = [factor * row.get(column, math.nan) for row in every]
                name = f"_{style.label}, seeds"  # that begins with _, so it is in no legend
                rates = [row["lr"] for row in every]
                axes.plot(rates, values, "x", color=style.color, markersize=4, label=name, gid=style.label)
    for axes in (losses, scores):
        axes.set(xlabel="learning rate", xscale="log")
    losses.set(ylabel="final training loss", yscale="log" if has_logarithm(losses) else "linear")
    starts = [row["start_loss"] for row in files.sweep if "start_loss" in row]
    if starts and math.isfinite(starts[0]):
        losses.axhline(starts[0], color="black", linestyle=":", linewidth=1, label="before training")
        losses.set_ylim(top=min(losses.get_ylim()[1], _ABOVE * starts[0]))
    scores.set_ylabel(f"final {measure.header}")
    legend_beside(figure, losses)
    return figure


def _trials(files: Files) -> Figure:
    measure = files.criterion
    figure, (axes,) = new_figure(1)
    for method, style in files.styles.items():
        first = _first_runs(files, method)
        rows = sorted((row for row in first if "lr" in row), key=lambda row: row["lr"])
        if rows:
            values = [measure.factor * row[measure.column] for row in rows]
            plot(axes, style, [row["lr"] for row in rows], values, marker="o", linewidth=0.8)
        again = [row for row in files.tuning if row["method"] == method and "lr" in row and row not in first]
        if again:
            values = [measure.factor * row[measure.column] for row in again]
            name = f"_{style.label}, again"  # that begins with _, so it is in no legend
            axes.plot(
                [r["lr"] for r in again], values, "x", color=style.color, markersize=4, label=name, gid=style.label
            )
    yscale = "log" if measure.lower_is_better and has_logarithm(axes) else "linear"
    axes.set(xlabel="learning rate", ylabel=measure.label, xscale="log", yscale=yscale)
    legend_beside(figure, axes)
    return figure
