"""The page of what was measured along a training path, from the CSV files of the measurements alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from lightning_modules.report.escape.figures import escape_figures
from lightning_modules.report.measurements.averaging import draw_averaging
from lightning_modules.report.measurements.quadratic import draw_quadratic
from lightning_modules.report.measurements.sharpness import draw_sharpness
from lightning_modules.report.measurements.valley import draw_valley
from lightning_modules.report.page import write_page
from lightning_modules.support.files import Rows, read_csv


def write_measurements(folder: Path, *, title: str) -> Path:
    """Draw every measurement found in a folder, and write measurements.html beside the figures; returns its path.

    A folder ``escape`` in it, as ``nsgd escape`` writes it, has its figures on the same page.

    Raises:
        ValueError: If there is none.
    """
    figures = measurement_figures(folder)
    if (folder / "escape" / "escape.csv").exists():
        figures |= {
            name: (figure, f"Simulated walkers on a double well, no network. {words}")
            for name, (figure, words) in escape_figures(folder / "escape").items()
        }
    if not figures:
        names = ", ".join(f"{name}.csv" for name in _DRAWN)
        raise ValueError(f"expected measurements in {folder}, one of {names}; got none")
    config = folder / "config.yaml"
    appendix = {"Configuration": config.read_text()} if config.exists() else {}
    return write_page(folder / "measurements.html", title=title, figures=figures, appendix=appendix)


def measurement_figures(folder: Path) -> dict[str, tuple[Figure, str]]:
    """Name to figure and caption, of every measurement found in a folder."""
    files = {name: folder / f"{name}.csv" for name in _DRAWN}
    found = {name: read_csv(path) for name, path in files.items() if path.exists()}
    return {name: _DRAWN[name](rows) for name, rows in found.items() if rows}


_DRAWN: dict[str, Callable[[Rows], tuple[Figure, str]]] = {
    "sharpness": draw_sharpness,
    "valley": draw_valley,
    "quadratic": draw_quadratic,
    "averaging": draw_averaging,
}
