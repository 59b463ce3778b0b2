"""The report of a study: one page and its tables in a terminal, made from the files in its folder and nothing else."""

from __future__ import annotations

from pathlib import Path

import yaml
from rich.console import Console

from lightning_modules.report.page import Section, print_tables, write_page
from lightning_modules.report.study.figures import study_figures
from lightning_modules.report.study.files import Files, label, read_folder
from lightning_modules.report.study.tables import PRODUCTS, TEST, TEXT_COLUMNS, main_tables, minus, settings_table
from lightning_modules.report.study.words import caption, shortfalls, summary, title

_TABLES = (
    *("config.yaml", "settled.yaml", "environment.yaml", "results.csv", "times.csv", "summary.csv"),
    *("tuning.csv", "sweep.csv", "target.csv", "target-times.csv", "deaths.csv"),
)


def write_report(folder: Path) -> Path:
    """Draw the figures and write report.html, self-contained, beside them; returns its path."""
    files = read_folder(folder)
    return write_page(
        folder / "report.html",
        title=title(files),
        summary=summary(files),
        tables=[*main_tables(files), settings_table(files)],
        text_columns=TEXT_COLUMNS,
        caption=caption(files),
        sections=[Section("Where NSGD did not help", shortfalls(files))],
        figures=study_figures(files),
        links=_links(files),
        appendix={
            "Configuration": yaml.safe_dump(files.config, sort_keys=False),
            "Environment": yaml.safe_dump(files.environment, sort_keys=False),
        },
    )


def print_table(folder: Path, console: Console) -> None:
    """Print the study's summary and main tables to a terminal."""
    files = read_folder(folder)
    console.print(title(files), style="bold", markup=False)
    for sentence in summary(files):
        console.print(f"- {sentence}", markup=False, highlight=False)
    print_tables(
        console,
        main_tables(files),
        text_columns=TEXT_COLUMNS,
        wrapped=("method", TEST, minus(files), PRODUCTS, files.score.validation.header),
    )
    console.print(caption(files), markup=False, highlight=False)


def _links(files: Files) -> dict[str, str]:
    """Every file that the report was made from."""
    links = {name: name for name in _TABLES if (files.folder / name).exists()}
    for method, runs in files.metrics.items():
        for seed in runs:
            run = f"runs/{method}-{seed}"
            links[f"{label(method)}, seed {seed}: settings"] = f"{run}/run.yaml"
            links[f"{label(method)}, seed {seed}: every step"] = f"{run}/metrics.csv"
    return links
