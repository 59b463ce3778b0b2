"""The report of ``nsgd escape``: a page, and its tables in a terminal, from the files in its folder alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lightning_modules.report.escape.figures import escape_figures
from lightning_modules.report.escape.files import Files, inverse, prediction, read_folder
from lightning_modules.report.escape.findings import TOLERANCE, findings, number, overall
from lightning_modules.report.page import print_tables, write_page

_TEXT_COLUMNS = ("damped",)
_RULE = (
    f"Confirmed: the difference to the prediction and twice its standard error are within {TOLERANCE:.0%} of it. Not "
    f"confirmed: it is beyond {TOLERANCE:.0%} by more than twice its standard error. Not resolved: neither. Standard "
    "errors are those of the walkers' number; ± is twice that. To escape is to reach the other minimum, not the saddle."
)


def write_escape(folder: Path) -> Path:
    """Draw the figures as PNG and write escape.html, self-contained, beside them; returns its path."""
    files = read_folder(folder)
    return write_page(
        folder / "escape.html",
        title=_title(files),
        verdict=overall(files),
        summary=_terms(files),
        tables=_tables(files),
        text_columns=_TEXT_COLUMNS,
        caption=_RULE,
        figures=escape_figures(folder),
        appendix={
            "Configuration": yaml.safe_dump(files.config, sort_keys=False),
            "Landscape": yaml.safe_dump(files.landscape, sort_keys=False),
            "Environment": yaml.safe_dump(files.environment, sort_keys=False),
        },
    )


def print_escape(folder: Path, console: Console) -> None:
    """Print tables and findings to a terminal."""
    files = read_folder(folder)
    console.print(_title(files), style="bold", markup=False)
    print_tables(console, _tables(files), text_columns=_TEXT_COLUMNS)
    for sentence in (*findings(files), files.assumption, _RULE):
        console.print(sentence, markup=False, highlight=False)


def _title(files: Files) -> str:
    momentum = f", momentum {files.momentum:g}" if files.momentum else ""
    return f"Escape from a minimum: {files.config['potential']}{momentum}, {files.config['walkers']:,} walkers"


def _terms(files: Files) -> list[str]:
    """Sentences on what was run, and on what the letters mean."""
    config, barrier = files.config, files.barrier
    is_constant = files.follows == "constant"
    felt = "is the barrier" if is_constant else "= ∫ f'/r, for noise of variance σ²r, is what the barrier is to it"
    heat = "ησ²/(2B)"
    if files.momentum:
        heat = f"ησ²/(2B(1 − β)), with momentum β = {files.momentum:g}, whose inertia slows escapes"
    heats = [barrier / row["temperature"] for row in files.of("escape")]
    hot, cold = f"{min(heats):.3g}", f"{max(heats):.3g}"
    return [
        f"{config['walkers']:,} walkers take steps of SGD on a potential f with two minima, without any network. How "
        "long they take to the other minimum, where they stay, and what γ changes in that, which scales the step along "
        "one direction as NSGD does, is held against what the theory of diffusion predicts.",
        f"η is the learning rate (lr), B the batch size, and σ² = {config['noise']:g} the variance of one sample's "
        f"gradient. The noise of SGD acts as a temperature T = {heat}; {files.height} = {barrier:.3g} {felt}, "
        "which is " + (f"{hot} temperatures high here." if hot == cold else f"{hot} to {cold} temperatures high here."),
        files.assumption,
    ]


def _tables(files: Files) -> list[dict[str, Any]]:
    """A title, a header and rows of text each."""
    barrier = files.barrier
    escapes = [
        [
            f"{row['lr']:g}",
            f"{row['batch_size']:g}",
            f"{inverse(row):.4g}",
            f"{barrier / row['temperature']:.3g}",
            *_steps(row),
            number(row["leading"]),
        ]
        for row in files.of("escape")
    ]
    losses = {row["batch_size"]: row for row in files.of("loss")}
    stays = []
    for row in files.of("share", origin="both"):
        size = row["batch_size"]
        sharp, flat = (files.of("share", origin=name, batch_size=size)[0]["measured"] for name in ("sharp", "flat"))
        loss = losses[size]
        shares = [f"{100 * value:.1f}" for value in (sharp, flat)]
        shares += [_estimate(row, 100), number(100 * prediction(row))]
        stays.append([f"{size:g}", *shares, _estimate(loss), number(prediction(loss))])
    damped = [[row["damped"], f"{row['gamma']:g}", *_steps(row)] for row in files.of("damped escape")]
    steps = ["arrived", "steps", "quadrature"]
    return [
        {
            "title": f"Escape from the {files.landscape['names']['start']} minimum to the other one",
            "header": ["lr", "B", "B/η", f"{files.height}/T", *steps, "Kramers"],
            "rows": escapes,
        },
        {
            "title": f"Share of the flat minimum, %, and loss above the minimum, at lr {files.config['lr'][0]:g}",
            "header": ["B", "from sharp", "from flat", "share", "theory", "loss", "theory"],
            "rows": stays,
        },
        {
            "title": f"One direction's step scaled by gamma, at lr {min(files.config['lr']):g} and batch size "
            f"{files.config['gamma_batch_size']:g}",
            "header": ["damped", "gamma", *steps],
            "rows": damped,
        },
    ]


def _estimate(row: dict[str, Any], scale: float = 1) -> str:
    value, twice = scale * row["measured"], 2 * scale * row["standard_error"]
    if not math.isfinite(value):
        return "unknown"
    return f"{number(value)} ± {twice:,.0f}" if twice >= 10 else f"{number(value)} ± {twice:#.2g}".rstrip(".")


def _steps(row: dict[str, Any]) -> list[str]:
    """Share that arrived, steps, and what the quadrature says."""
    return [f"{row['arrived'] / row['walkers']:.1%}", _estimate(row), number(row["exact"])]
