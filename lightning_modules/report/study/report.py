"""The report of a study: one page and its main table in a terminal, made from the files in its folder alone."""

from __future__ import annotations

from pathlib import Path

import yaml
from rich.console import Console

from lightning_modules.report.page import Figures, Section, print_tables, write_page
from lightning_modules.report.study.averages import AVERAGES, WORDS, averages_tables
from lightning_modules.report.study.figures import study_figures
from lightning_modules.report.study.files import Files, read_folder
from lightning_modules.report.study.paths import PATHS, paths_tables
from lightning_modules.report.study.paths import WORDS as PATHS_WORDS
from lightning_modules.report.study.rates import edges, settings_table
from lightning_modules.report.study.seeds import SEEDS
from lightning_modules.report.study.shortfalls import shortfalls_table, shortfalls_words
from lightning_modules.report.study.tables import TEXT_COLUMNS, main_tables, overview, short_table
from lightning_modules.report.study.verdict import beside_averages, verdict
from lightning_modules.report.study.words import caption, endpoint, notes, summary, title

_TABLES = (
    *("config.yaml", "methods.yaml", "settled.yaml", "environment.yaml", "results.csv", "times.csv", "summary.csv"),
    *("tuning.csv", "sweep.csv", "target.csv", "target-times.csv", "deaths.csv"),
)


def write_report(folder: Path) -> Path:
    """Draw the figures and write report.html, self-contained, beside them; returns its path."""
    files = read_folder(folder)
    figures = list(study_figures(files).items())
    first = 1 if "training-loss" in dict(figures) else 0
    return write_page(
        folder / "report.html",
        title=title(files),
        verdict=verdict(files),
        figures=dict(figures[:first]),
        tables=[overview(files)],
        text_columns=TEXT_COLUMNS,
        caption=notes(files),
        sections=_sections(files, dict(figures[first:])),
        links=_links(files),
        appendix={
            "Configuration": yaml.safe_dump(files.config, sort_keys=False),
            "Environment": yaml.safe_dump(files.environment, sort_keys=False),
        },
    )


def _sections(files: Files, figures: Figures) -> list[Section]:
    """What comes after the one table; all but the first three are folded."""
    averages, table = beside_averages(files), shortfalls_table(files)
    more = {name: figure for name, figure in figures.items() if name not in (SEEDS, AVERAGES, PATHS)}
    schedules, paths = averages_tables(files), paths_tables(files)
    drawn, walked = ({name: figures[name]} if name in figures else {} for name in (AVERAGES, PATHS))
    return [
        Section("Every seed", figures={SEEDS: figures[SEEDS]}),
        *([Section("More than averaging gives?", averages)] if averages else []),
        *([Section("Averages and schedules", [WORDS], schedules, drawn)] if schedules else []),
        *([Section("Paths side by side", [PATHS_WORDS], paths, walked)] if paths or walked else []),
        Section("Where NSGD did not help", shortfalls_words(files), [table] if table["rows"] else []),
        Section("The result in sentences", summary(files), folded=True),
        Section("Every read-out with its test, costs", [caption(files)], main_tables(files), folded=True),
        Section("Settings", list(filter(None, [endpoint(files)])), [settings_table(files)], folded=True),
        *([Section("More figures", figures=more, folded=True)] if more else []),
    ]


def print_table(folder: Path, console: Console) -> None:
    """Print what came out, and one line a method, to a terminal or a pipe; all else is on the page."""
    files = read_folder(folder)
    console.print(title(files), style="bold", markup=False)
    console.print(verdict(files), markup=False, highlight=False)
    table = short_table(files)
    print_tables(console, [table], text_columns=table["header"], wrapped=["method"])
    for paragraph in edges(files):
        console.print(paragraph, markup=False, highlight=False)


def _links(files: Files) -> dict[str, str]:
    """Every file that the report was made from."""
    links = {name: name for name in _TABLES if (files.folder / name).exists()}
    for method, runs in files.metrics.items():
        for seed in runs:
            run = f"runs/{method}-{seed}"
            for what, name in (("settings", "run.yaml"), ("every step", "metrics.csv")):
                if (files.folder / run / name).exists():
                    links[f"{files.label(method)}, seed {seed}: {what}"] = f"{run}/{name}"
    return links
