"""The page of what was measured along a training path, from the CSV files of the measurements alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_modules.report.measurements.averaging import draw_averaging, summarize_averaging
from lightning_modules.report.measurements.quadratic import draw_quadratic, summarize_quadratic
from lightning_modules.report.measurements.sharpness import draw_sharpness, summarize_sharpness
from lightning_modules.report.measurements.valley import draw_valley, summarize_valley, valley_table
from lightning_modules.report.page import write_page
from lightning_modules.support import quantities
from lightning_modules.support.files import Rows, read_csv, unused

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_measurements(folder: Path, files: Mapping[str, Path], *, title: str, config: Path | None = None) -> Path:
    """Draw measurements, and write measurements.html and its figures into a folder; returns its path.

    The page begins with a sentence on each measurement, and on what the signs mean that it uses.

    What an earlier run left there stays: the page has a number in its name then, and each figure is named after the
    file that it is drawn from.

    Args:
        folder: Where page and figures go.
        files: Name of each measurement to the CSV file that it wrote.
        title: Of the page.
        config: The file of the run's options, which are shown below; None for none.

    Raises:
        ValueError: If none of the files has a row.
    """
    found = _rows(files)
    figures = {files[name].stem: _DRAW[name](rows) for name, rows in found.items()}
    if not figures:
        raise ValueError(f"expected a file of {', '.join(quantities.MEASUREMENTS)} with rows for {folder}, got none")
    appendix = {} if config is None else {"Configuration": config.read_text(encoding="utf-8")}
    signs = " ".join([_SIGNS, *(words for name, words in _SIGNS_OF.items() if name in found)])
    summary = [*(_SUMMARIZE[name](rows) for name, rows in found.items()), signs]
    tables = [valley_table(found[quantities.VALLEY])] if quantities.VALLEY in found else []
    page = unused(folder / "measurements.html")
    return write_page(page, title=title, summary=summary, figures=figures, tables=tables, appendix=appendix)


def measurement_figures(files: Mapping[str, Path]) -> dict[str, tuple[Figure, str]]:
    """Name to figure and caption of every measurement that has rows, from the files that they wrote."""
    return {name: _DRAW[name](rows) for name, rows in _rows(files).items()}


def measured(folder: Path) -> dict[str, Rows]:
    """The rows of each measurement of a folder that one run alone has written into."""
    return _rows(measurements_in(folder))


def _rows(files: Mapping[str, Path]) -> dict[str, Rows]:
    """The rows of each measurement that has some, always in one order."""
    found = {name: read_csv(files[name]) for name in _DRAW if name in files}
    return {name: rows for name, rows in found.items() if rows}


def measurements_in(folder: Path) -> dict[str, Path]:
    """The files of a folder that one run alone has written into: name of each measurement to its file."""
    paths = {name: folder / f"{name}.csv" for name in quantities.MEASUREMENTS}
    return {name: path for name, path in paths.items() if path.exists()}


_DRAW: dict[str, Callable[[Rows], tuple[Figure, str]]] = {
    quantities.SHARPNESS: draw_sharpness,
    quantities.VALLEY: draw_valley,
    quantities.QUADRATIC: draw_quadratic,
    quantities.AVERAGING: draw_averaging,
}
_SUMMARIZE: dict[str, Callable[[Rows], str]] = {
    quantities.SHARPNESS: summarize_sharpness,
    quantities.VALLEY: summarize_valley,
    quantities.QUADRATIC: summarize_quadratic,
    quantities.AVERAGING: summarize_averaging,
}
_SIGNS = (
    "Signs: η or lr is the learning rate, β the momentum, B the samples of a training batch, T = η σ² / (2B) the "
    "temperature of SGD, with σ² the variance of one sample's gradient; g is a batch's gradient, H the Hessian of its "
    "loss."
)
_SIGNS_OF = {
    quantities.SHARPNESS: (
        "e1, e2, ... are the eigenvectors of H on the evaluation samples, from the top eigenvalue (the sharpness) on "
        "down. γ scales a damped step along its directions V; what damped steps feel is the top eigenvalue of "
        "M^½ H M^½ with M = I − (1 − γ) Vᵀ V. Steps are stable while it is below (2 + 2β) / η."
    ),
    quantities.AVERAGING: "Δ is the difference of two points of the path.",
}
