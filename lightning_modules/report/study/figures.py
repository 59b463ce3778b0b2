"""The figures of a study's report, each with its caption."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from lightning_modules.report.measurements.report import measurement_figures, measurements_in
from lightning_modules.report.page import new_figure
from lightning_modules.report.study.averages import averages_figures
from lightning_modules.report.study.curves import curve_figures
from lightning_modules.report.study.files import Files
from lightning_modules.report.study.numbers import and_
from lightning_modules.report.study.paths import paths_figures
from lightning_modules.report.study.rates import rate_figures
from lightning_modules.report.study.seeds import seed_figures
from lightning_modules.report.style import EARLIER
from lightning_modules.support.files import Rows


def study_figures(files: Files) -> dict[str, tuple[Figure, str]]:
    """Name to figure and caption: the loss first, where the runs are there, and then everything else."""
    drawn = (curve_figures, seed_figures, averages_figures, paths_figures, rate_figures)
    figures = {name: figure for draw in drawn for name, figure in draw(files).items()}
    if refreshed := _refreshed(files):
        figures["eigenvalues"] = (_eigenvalues(files, refreshed), _eigenvalues_caption(files, refreshed))
    for method in (m for m in files.methods if 0 in files.metrics[m]):
        measured = measurement_figures(measurements_in(files.folder / "runs" / f"{method}-0"))
        for name, (figure, words) in measured.items():
            figures[f"{name}-{method}"] = (figure, f"{files.label(method)}, first seed. {words}")
    return figures


# -- eigenvalues ---------------------------------------------------------------------------------------------------


def _refreshed(files: Files) -> dict[str, Rows]:
    """For each method whose directions have a curvature, the rows of its first seed at which they were refreshed."""
    found = {}
    for method, runs in files.metrics.items():
        options = files.directions(method)
        rows = [row for row in next(iter(runs.values()), []) if "weight_1" in row]
        if rows and options["solver"] != "random":
            found[method] = rows
    return found


def _limits(files: Files, method: str) -> list[tuple[str, float, str]]:
    """Label, level and line style of the limits of stable steps, outside and along the directions."""
    settings, options = files.settings[method], files.directions(method)
    if method not in EARLIER or "momentum" not in settings:  # other steps are bounded by a preconditioned curvature
        return []
    edge = 2 + 2 * settings["momentum"]
    inside = ("(2 + 2β) / (γ lr)", options["gamma"] * settings["lr"], ":")
    outside = ("(2 + 2β) / lr", options["bulk_scale"] * settings["lr"], "--")
    wanted = [outside] if options["gamma"] == options["bulk_scale"] else [outside, inside]
    return [(name, edge / rate, style) for name, rate, style in wanted if rate > 0]


def _eigenvalues(files: Files, refreshed: dict[str, Rows]) -> Figure:
    figure, panels = new_figure(len(refreshed))
    figure.set_size_inches(5.2 * len(refreshed), 3.8)
    for axes, (method, rows) in zip(panels, refreshed.items(), strict=True):
        steps, color = [row["step"] for row in rows], files.styles[method].color
        k = max(sum(name.startswith("weight_") for name in row) for row in rows)  # at first there may be fewer
        for i in range(k, 0, -1):
            values = [row.get(f"weight_{i}", math.nan) for row in rows]
            axes.plot(steps, values, color=color, alpha=1 if i == 1 else 0.35, linewidth=1.6 if i == 1 else 0.8)
        lines = [] if _from_training(rows) else _limits(files, method)
        for name, level, style in lines:
            axes.axhline(level, color="black", linestyle=style, linewidth=1, label=f"{name} = {level:.3g}")
        positive = all(value > 0 for row in rows for name, value in row.items() if name.startswith("weight_"))
        axes.set(xlabel="optimizer steps", yscale="log" if positive else "symlog", title=files.label(method))
        if lines:
            axes.legend(frameon=False, loc="lower left", fontsize=8)
    panels[0].set_ylabel("weights of the directions")
    return figure


_EXACT = {"lanczos", "arpack"}  # solvers that find eigenvalues
_MOMENTS = (
    "Weights of the directions that come from the gradients which training leaves: second moments of the noise in a "
    "batch's gradient. They rank the directions and fall with the loss, and are no eigenvalues, so that no limit of "
    "stable steps is drawn. First seed; the strong line is the largest."
)


def _from_training(rows: Rows) -> bool:
    """Whether directions came from training's own gradients: they cost none."""
    return bool(rows[-1]["gradients"] == rows[-1]["step"])


def _eigenvalues_caption(files: Files, refreshed: dict[str, Rows]) -> str:
    options = files.config["nsgd"]
    source = "the running batch" if options["source"] == "batch" else "the training set"
    samples = options["samples"] or ("all" if options["source"] == "batch" else 2560)
    from_training = [method for method, rows in refreshed.items() if _from_training(rows)]
    if len(from_training) == len(refreshed):
        return _MOMENTS
    solvers = {files.directions(method)["solver"] for method in refreshed if method not in from_training}
    kinds = [
        *(["variances of the gradients of small groups, which stand in for eigenvalues"] if solvers - _EXACT else []),
        *(["eigenvalues that products found"] if solvers & _EXACT else []),
    ]
    numbers = {files.directions(method)["k"] for method in refreshed}
    k = " or ".join(str(number) for number in sorted(numbers))
    limits = (
        " Dashed: the limit (2 + 2β)/lr of stable steps in undamped directions; dotted: (2 + 2β)/(γ lr), the limit in "
        "damped ones (none where γ = 0); β is the momentum."
        if any(_limits(files, m) for m in refreshed)
        else ""
    )
    labels = and_([files.label(method) for method in from_training])
    return (f"{labels}: {_MOMENTS} The others: " if from_training else "") + (
        f"Curvature along the {k} directions as each refresh estimated it on {samples} samples of {source} "
        f"({and_(kinds)}, averaged over refreshes), first seed; the strong line is the largest.{limits} Small samples "
        "overestimate the curvature of the whole training loss."
    )
