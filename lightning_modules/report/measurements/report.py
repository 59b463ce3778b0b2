"""The page of what was measured along a training path, from the CSV files of the measurements alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from matplotlib.figure import Figure

from lightning_modules.report.measurements.averaging import draw_averaging
from lightning_modules.report.measurements.quadratic import draw_quadratic
from lightning_modules.report.measurements.sharpness import draw_sharpness
from lightning_modules.report.measurements.valley import draw_valley
from lightning_modules.report.page import write_page
from lightning_modules.support import quantities
from lightning_modules.support.files import Rows, read_csv, unused


def write_measurements(folder: Path, files: Mapping[str, Path], *, title: str, config: Path | None = None) -> Path:
    """Draw measurements, and write measurements.html and its figures into a folder; returns its path.

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
    figures = {files[name].stem: figure for name, figure in measurement_figures(files).items()}
    if not figures:
        raise ValueError(f"expected a file of {', '.join(quantities.MEASUREMENTS)} with rows for {folder}, got none")
    appendix = {} if config is None else {"Configuration": config.read_text()}
    return write_page(unused(folder / "measurements.html"), title=title, figures=figures, appendix=appendix)


def measurement_figures(files: Mapping[str, Path]) -> dict[str, tuple[Figure, str]]:
    """Name to figure and caption of every measurement that has rows, from the files that they wrote."""
    tables = {name: read_csv(files[name]) for name in _DRAW if name in files}
    return {name: _DRAW[name](rows) for name, rows in tables.items() if rows}


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
