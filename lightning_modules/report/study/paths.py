"""Paths side by side: the sharpness of every method along its first run, and the valley that it walks in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_modules.report.drawing import legend_beside
from lightning_modules.report.measurements.numbers import by_step, columns, value_of
from lightning_modules.report.measurements.report import measured
from lightning_modules.report.measurements.valley import BURSTS, burst_cells, bursts
from lightning_modules.report.page import new_figure
from lightning_modules.report.study.files import Files
from lightning_modules.support import quantities
from lightning_modules.support.files import Rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PATHS = "sharpness-of-all"  # name of the figure

WORDS = "What was measured along the first seed of each method, one run each: differences between two may be chance."


def paths_figures(files: Files) -> dict[str, tuple[Figure, str]]:
    """Name to figure and caption: the top eigenvalue along each path; none unless two methods or more have one."""
    measured_in = _measured(files, quantities.SHARPNESS)
    top = quantities.eigenvector(1)
    lines = {method: by_step(rows, quantities.EIGENVALUE, top) for method, rows in measured_in.items()}
    if len(lines) < 2:
        return {}
    figure, panels = new_figure(2)
    for method, found in lines.items():
        style, label = files.styles[method], files.label(method)
        look: dict[str, Any] = {"color": style.color, "linestyle": style.line, "label": label, "gid": label}
        panels[0].plot(*columns(list(found.items())), marker=".", **look)
        limits = by_step(measured_in[method], quantities.STABILITY_LIMIT)
        shares = [(step, value / limits[step]) for step, value in found.items() if limits.get(step)]
        panels[1].plot(*columns(shares), marker=".", **look)
    panels[0].set(xlabel="optimizer steps", ylabel="largest eigenvalue of the Hessian", yscale="log")
    panels[1].set(xlabel="optimizer steps", ylabel="its share of the limit (2 + 2β) / lr", yscale="log")
    panels[1].axhline(1, color="black", linewidth=0.8, label="_limit")
    legend_beside(figure, panels[0])
    sizes = {int(value_of(rows, quantities.EVALUATION_SAMPLES)) for rows in measured_in.values()}
    counts = f"{min(sizes)} of them" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)} of them, not the same"
    words = (
        f"The largest eigenvalue of the Hessian of the evaluation samples along the first run of each method "
        f"({counts}; few make it larger), and its share of the limit above which undamped steps grow."
    )
    return {PATHS: (figure, words)}


def paths_tables(files: Files) -> list[dict[str, Any]]:
    """One table, where the valley was measured: a row for each burst of steps of each method."""
    found = _measured(files, quantities.VALLEY)
    body = [
        [
            files.label(method) if i == 0 else "",
            _epoch(files, method, burst["step"]),
            f"{burst['step']}",
            *burst_cells(burst),
        ]
        for method, rows in found.items()
        for i, burst in enumerate(bursts(rows))
    ]
    title = "The valley: steps in a row, the barriers that they cross, and how high above the floor they go"
    header = ["method", "epoch", "from step", *BURSTS.values()]
    return [{"title": title, "header": header, "rows": body}] if len(found) > 1 else []


def _measured(files: Files, name: str) -> dict[str, Rows]:
    """The rows of a measurement, by method, of those that have some."""
    found = {}
    for method in (m for m in files.methods if 0 in files.metrics[m]):
        rows = measured(files.folder / "runs" / f"{method}-0").get(name)
        if rows:
            found[method] = rows
    return found


def _epoch(files: Files, method: str, step: int) -> str:
    """The epoch, from 1 on, in which the step after so many is."""
    return next((f"{row['epoch'] + 1}" for row in files.metrics[method][0] if row["step"] > step), "")
