"""The figures of a study's report, each with its caption."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_modules.report.measurements.report import measurement_figures, measurements_in
from lightning_modules.report.page import new_figure
from lightning_modules.report.study.files import Files, label
from lightning_modules.report.study.tables import upper
from lightning_modules.study.methods import RECIPES, Method
from lightning_modules.support.files import Rows
from lightning_modules.support.score import Measure

STYLES: dict[Method, tuple[str, str]] = {name: (recipe.color, recipe.line) for name, recipe in RECIPES.items()}
AXES = {"step": "optimizer steps", "gradients": "gradients, refreshes included", "seconds": "seconds of training"}
_ABOVE = 3  # times the loss before training: what diverged would flatten the rest of the axis
_SENSITIVITY = (
    "Training loss and {score} of the last weights against the learning rate, one run for each point, all "
    "with the same seed; other settings are those of the study. Dotted: the loss of the first batch before training. "
    "Losses that are not finite are not drawn, nor are those above {above} times the dotted line."
)

Point = tuple[dict[str, float], float]  # row of a run's steps, value there


def study_figures(files: Files) -> dict[str, tuple[Figure, str]]:
    """Name to figure and caption."""
    band = "Lines are means over the seeds, bands reach from the lowest to the highest."
    loss = _against_costs(files, _epoch_losses, "training loss, mean of each epoch", log=True)
    measure = files.score.validation
    score = _against_costs(files, lambda run: _scores(run, measure), measure.header, log=False)
    figures = {
        "training-loss": (loss, f"Training loss against the three axes of cost. {band}"),
        measure.label.replace(" ", "-"): (score, f"{upper(measure.label)} after each epoch. {band}"),
    }
    if files.sweep:
        words = _SENSITIVITY.format(score=measure.label, above=_ABOVE)
        figures["learning-rates"] = (_sensitivity(files), words)
    if any("lr" in row for row in files.tuning):
        criterion = upper(files.criterion.label)
        words = f"{criterion} of every trial against its learning rate; other settings may differ too."
        figures["trials"] = (_trials(files), f"{words} What diverged is not drawn.")
    if refreshed := _refreshed(files):
        figures["eigenvalues"] = (_eigenvalues(files, refreshed), _eigenvalues_caption(files, refreshed))
    for method in (m for m in files.methods if 0 in files.metrics[m]):
        measured = measurement_figures(measurements_in(files.folder / "runs" / f"{method}-0"))
        for name, (figure, words) in measured.items():
            figures[f"{name}-{method}"] = (figure, f"{label(method)}, first seed. {words}")
    return figures


# -- curves --------------------------------------------------------------------------------------------------------


def _epoch_losses(run: Rows) -> list[Point]:
    """Mean loss of each epoch, at its last step; the last epoch may be cut short."""
    ends = [i for i, row in enumerate(run) if i + 1 == len(run) or run[i + 1]["epoch"] != row["epoch"]]
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [
        (run[b], float(np.mean([row["loss"] for row in run[a : b + 1]]))) for a, b in zip(starts, ends, strict=True)
    ]


def _scores(run: Rows, measure: Measure) -> list[Point]:
    """What validations said, as it is printed."""
    return [(row, measure.factor * row[measure.column]) for row in run if measure.column in row]


def _against_costs(files: Files, points: Callable[[Rows], list[Point]], ylabel: str, *, log: bool) -> Figure:
    figure, panels = new_figure(len(AXES))
    for method, runs in files.metrics.items():
        curves = [points(run) for run in runs.values()]
        length = min((len(curve) for curve in curves), default=0)  # with other numbers of steps, up to the shortest
        if not length:
            continue
        y = np.array([[value for _, value in curve[:length]] for curve in curves])  # (seeds, points)
        for axes, cost in zip(panels, AXES, strict=True):
            x = np.array([[row[cost] for row, _ in curve[:length]] for curve in curves]).mean(0)
            _plot(axes, method, x, y.mean(0), marker="o" if length == 1 else "")
            axes.fill_between(x, y.min(0), y.max(0), color=STYLES[method][0], alpha=0.15, linewidth=0)
    for axes, name in zip(panels, AXES.values(), strict=True):
        axes.set(xlabel=name, yscale="log" if log and _has_logarithm(axes) else "linear")
    panels[0].set_ylabel(ylabel)
    _legend(panels[0])
    return figure


def _plot(axes: Axes, method: Method, x: Any, y: Any, *, marker: str, linewidth: float = 1.6) -> None:
    color, style = STYLES[method]
    axes.plot(x, y, style, color=color, label=label(method), marker=marker, markersize=4, linewidth=linewidth)


def _has_logarithm(axes: Axes) -> bool:
    """Whether there is anything to draw, for a method that diverged has no curve from there on, and all above 0."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()] or [np.empty(0)])
    finite = values[np.isfinite(values)]
    return bool(len(finite) and (finite > 0).all())


def _legend(axes: Axes) -> None:
    if axes.get_lines():
        axes.legend(frameon=False, fontsize=8)


# -- learning rates ------------------------------------------------------------------------------------------------


def _sensitivity(files: Files) -> Figure:
    measure = files.score.validation
    figure, (losses, scores) = new_figure(2)
    for method in files.methods:
        rows = sorted((row for row in files.sweep if row["method"] == method), key=lambda row: row["lr"])
        if rows:
            rates = [row["lr"] for row in rows]
            _plot(losses, method, rates, [row["train_loss"] for row in rows], marker="o")
            values = [measure.factor * row.get(measure.column, math.nan) for row in rows]
            _plot(scores, method, rates, values, marker="o")
    for axes in (losses, scores):
        axes.set(xlabel="learning rate", xscale="log")
    losses.set(ylabel="final training loss", yscale="log" if _has_logarithm(losses) else "linear")
    starts = [row["start_loss"] for row in files.sweep if "start_loss" in row]
    if starts and math.isfinite(starts[0]):
        losses.axhline(starts[0], color="black", linestyle=":", linewidth=1, label="before training")
        losses.set_ylim(top=min(losses.get_ylim()[1], _ABOVE * starts[0]))
    scores.set_ylabel(f"final {measure.header}")
    _legend(losses)
    return figure


def _trials(files: Files) -> Figure:
    measure = files.criterion
    figure, (axes,) = new_figure(1)
    for method in files.methods:
        rows = sorted((r for r in files.tuning if r["method"] == method and "lr" in r), key=lambda row: row["lr"])
        if rows:
            values = [measure.factor * r[measure.column] for r in rows]
            _plot(axes, method, [r["lr"] for r in rows], values, marker="o", linewidth=0.8)
    yscale = "log" if measure.lower_is_better and _has_logarithm(axes) else "linear"
    axes.set(xlabel="learning rate", ylabel=measure.label, xscale="log", yscale=yscale)
    _legend(axes)
    return figure


# -- eigenvalues ---------------------------------------------------------------------------------------------------


def _refreshed(files: Files) -> dict[Method, Rows]:
    """For each method whose directions have a curvature, the rows of its first seed at which they were refreshed."""
    found = {}
    for method, runs in files.metrics.items():
        options = files.directions(method)
        rows = [row for row in next(iter(runs.values()), []) if "weight_1" in row]
        if rows and options is not None and options.solver != "random":
            found[method] = rows
    return found


def _limits(files: Files, method: Method) -> list[tuple[str, float, str]]:
    """Label, level and line style of the limits of stable steps, outside and along the directions."""
    settings, options = files.settings[method], files.directions(method)
    if options is None or "momentum" not in settings:  # AdamW's steps are bounded by another, preconditioned curvature
        return []
    edge = 2 + 2 * settings["momentum"]
    inside = ("(2 + 2β) / (γ lr)", options.gamma * settings["lr"], ":")
    outside = ("(2 + 2β) / lr", options.bulk_scale * settings["lr"], "--")
    wanted = [outside] if options.gamma == options.bulk_scale else [outside, inside]
    return [(name, edge / rate, style) for name, rate, style in wanted if rate > 0]


def _eigenvalues(files: Files, refreshed: dict[Method, Rows]) -> Figure:
    figure, panels = new_figure(len(refreshed))
    figure.set_size_inches(5.2 * len(refreshed), 3.8)
    for axes, (method, rows) in zip(panels, refreshed.items(), strict=True):
        steps, color = [row["step"] for row in rows], STYLES[method][0]
        k = max(sum(name.startswith("weight_") for name in row) for row in rows)  # at first there may be fewer
        for i in range(k, 0, -1):
            values = [row.get(f"weight_{i}", math.nan) for row in rows]
            axes.plot(steps, values, color=color, alpha=1 if i == 1 else 0.35, linewidth=1.6 if i == 1 else 0.8)
        lines = [] if _from_training(rows) else _limits(files, method)
        for name, level, style in lines:
            axes.axhline(level, color="black", linestyle=style, linewidth=1, label=f"{name} = {level:.3g}")
        positive = all(value > 0 for row in rows for name, value in row.items() if name.startswith("weight_"))
        axes.set(xlabel="optimizer steps", yscale="log" if positive else "symlog", title=label(method))
        if lines:
            axes.legend(frameon=False, loc="lower left", fontsize=8)
    panels[0].set_ylabel("weights of the directions")
    return figure


_MOMENTS = (
    "Weights of the directions that come from the gradients which training leaves: second moments of the noise in a "
    "batch's gradient. They rank the directions and fall with the loss, and are no eigenvalues, so that no limit of "
    "stable steps is drawn. First seed; the strong line is the largest."
)


def _from_training(rows: Rows) -> bool:
    """Whether directions came from training's own gradients: they cost none."""
    return bool(rows[-1]["gradients"] == rows[-1]["step"])


def _and_labels(methods: list[Method]) -> str:
    return " and ".join(label(method) for method in methods)


def _eigenvalues_caption(files: Files, refreshed: dict[Method, Rows]) -> str:
    options = files.config["nsgd"]
    source = "the running batch" if options["source"] == "batch" else "the training set"
    samples = options["samples"] or ("all" if options["source"] == "batch" else 2560)
    from_training = [method for method, rows in refreshed.items() if _from_training(rows)]
    if len(from_training) == len(refreshed):
        return _MOMENTS
    kind = (
        "second moments of the gradients of small groups, which stand in for eigenvalues"
        if options["solver"] in ("auto", "gradients")
        else "eigenvalues that products found"
    )
    numbers = {o.k for m in refreshed if (o := files.directions(m)) is not None}
    k = " or ".join(str(number) for number in sorted(numbers))
    limits = (
        " Dashed: the limit (2 + 2β)/lr of stable steps in undamped directions; dotted: (2 + 2β)/(γ lr), the limit in "
        "damped ones (none where γ = 0); β is the momentum."
        if any(_limits(files, m) for m in refreshed)
        else ""
    )
    moments = f"{_and_labels(from_training)}: {_MOMENTS} The others: " if from_training else ""
    return moments + (
        f"Curvature along the {k} directions as each refresh estimated it on {samples} samples of {source} "
        f"({kind}, averaged over refreshes), first seed; the strong line is the largest.{limits} Small samples "
        "overestimate the curvature of the whole training loss."
    )
