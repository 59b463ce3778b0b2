"""Tables, figures and findings of ``nsgd escape``, made from the files in its folder and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from lightning_modules.page import new_figure, print_tables, write_page
from lightning_modules.rows import Rows, read_csv

TOLERANCE = 0.1  # of a prediction
FIT_FROM = 4.0  # temperatures in the barrier: below, the prefactor's own dependence on the temperature bends the line
FEWEST = 20  # arrivals for a time to be drawn and fitted

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#444444")  # Okabe and Ito
_TEXT_COLUMNS = ("damped",)
_RULE = (
    f"Confirmed: the difference to the prediction and twice its standard error are within {TOLERANCE:.0%} of it. Not "
    f"confirmed: it is beyond {TOLERANCE:.0%} by more than twice its standard error. Not resolved: neither. Standard "
    "errors are those of the walkers' number; ± is twice that. To escape is to reach the other minimum, not the saddle."
)


@dataclass(frozen=True)
class Files:
    """What a folder holds."""

    config: dict[str, Any]
    landscape: dict[str, Any]
    environment: dict[str, Any]
    rows: Rows

    def of(self, quantity: str, **values: Any) -> Rows:
        """The rows of a quantity that have these values."""
        wanted = {"quantity": quantity, **values}
        return [row for row in self.rows if all(row.get(name) == value for name, value in wanted.items())]


def read_folder(folder: Path) -> Files:
    """Read a finished run of the command."""
    config, landscape, environment = (
        yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("config", "landscape", "environment")
    )
    return Files(config, landscape, environment, read_csv(folder / "escape.csv"))


def write_escape(folder: Path) -> Path:
    """Draw the figures as PNG and write escape.html, self-contained, beside them; returns its path."""
    files = read_folder(folder)
    return write_page(
        folder / "escape.html",
        title=_title(files),
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


def escape_figures(folder: Path) -> dict[str, tuple[Figure, str]]:
    """Name to figure and caption."""
    files = read_folder(folder)
    times, damped, share, loss = findings(files)
    return {
        "escape-time": (_escape_figure(files), f"{times} {damped}"),
        "flat-minimum": (_stay_figure(files), f"{share} {loss}"),
    }


def print_escape(folder: Path, console: Console) -> None:
    """Print tables and findings to a terminal."""
    files = read_folder(folder)
    console.print(_title(files), style="bold", markup=False)
    print_tables(console, _tables(files), text_columns=_TEXT_COLUMNS)
    for said in (*findings(files), _RULE):
        console.print(said, markup=False, highlight=False)


def _title(files: Files) -> str:
    return f"Escape from a minimum: {files.config['potential']}, {files.config['walkers']:,} walkers"


# -- findings --------------------------------------------------------------------------------------------------------


def findings(files: Files) -> tuple[str, str, str, str]:
    """One sentence each on escape times, damped escapes, the flat minimum's share and the price."""
    return _times(files), _damped(files), _share(files), _loss(files)


def verdict(checks: Iterable[tuple[float, float, float]]) -> str:
    """What measurements say of predictions: confirmed, not confirmed or not resolved.

    Args:
        checks: Measured, its standard error, and predicted, each.
    """
    beyond = [
        (abs(measured - predicted) - TOLERANCE * abs(predicted), 2 * error) for measured, error, predicted in checks
    ]
    if any(distance > margin for distance, margin in beyond):
        return "not confirmed"
    return "confirmed" if beyond and all(distance <= -margin for distance, margin in beyond) else "not resolved"


def _slope(x: list[float], y: list[float], errors: list[float]) -> tuple[float, float]:
    """Of the straight line through points that count alike, and its standard error."""
    # Weights would favour the hottest points, which have the most arrivals and for which the line holds least.
    centred = np.array(x) - np.mean(x)
    weights = centred / (centred**2).sum()
    return float(weights @ np.array(y)), float(np.sqrt((weights**2) @ np.array(errors) ** 2))


def _predicted(row: dict[str, Any]) -> float:
    """By quadrature where there is one, else to leading order."""
    return float(row["leading"] if math.isnan(row["exact"]) else row["exact"])


def _range(values: Iterable[float], kind: str) -> str:
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "unknown"
    low, high = f"{min(known):{kind}}", f"{max(known):{kind}}"
    return low if low == high else f"{low} to {high}"


def _known(value: float) -> str:
    return _number(value) if math.isfinite(value) else "unknown"


def _inverse(row: dict[str, Any]) -> float:
    return float(row["batch_size"] / row["lr"])


def _times(files: Files) -> str:
    rows = files.of("escape")
    barrier = files.landscape["barrier"]
    predicted = 2 * barrier / files.config["noise"]
    fitted = [row for row in rows if barrier / row["temperature"] >= FIT_FROM * (1 - 1e-9) and row["arrived"] >= FEWEST]
    missing, walkers = sum(row["censored"] for row in rows), sum(row["walkers"] for row in rows)
    steps = files.config["steps"]
    counts = f"{missing:,} of {walkers:,} walkers had not arrived after {steps:,} steps and count by the later rate."
    x = [_inverse(row) for row in fitted]
    if len({round(value, 6) for value in x}) < 2:
        return (
            f"Escape times, not resolved: fewer than two values of B/η have a barrier of {FIT_FROM:g} temperatures and "
            f"{FEWEST} arrivals; {counts}"
        )
    times = [row["measured"] * row["lr"] for row in fitted]
    slope, error = _slope(x, [math.log(t) for t in times], [r["standard_error"] / r["measured"] for r in fitted])
    exact = [row["exact"] * row["lr"] for row in fitted]
    own, off = "", [abs(row["measured"] / row["exact"] - 1) for row in fitted]
    if not any(math.isnan(t) for t in exact):
        bent, _ = _slope(x, [math.log(t) for t in exact], [0.0] * len(x))
        own = f" (the quadrature's: {bent / predicted:.3f}; the times are within {max(off):.1%} of it)"
    return (
        f"Escape times, {verdict([(slope, error, predicted)])}: with barriers of {FIT_FROM:g} temperatures or more the "
        f"slope of log time against B/η is {slope / predicted:.3f} ± {2 * error / predicted:.3f} times 2Δf/σ²{own}; "
        f"{counts}"
    )


def _damped(files: Files) -> str:
    rows = files.of("damped escape")
    checks = [(r["measured"], r["standard_error"], r["exact"]) for r in rows if not math.isnan(r["exact"])]
    tested = any(row["gamma"] != 1 and not math.isnan(row["exact"]) for row in rows)
    said = []
    for name, curvature in files.landscape["damped"].items():
        of = {row["gamma"]: row for row in rows if row["damped"] == name}
        low, base = min(of), 1.0 if 1.0 in of else max(of)
        place = {"way out": "way out", "sharpest": "sharpest direction"}[name]
        if name == "sharpest" and files.config["potential"] == "double-well":
            place += " of a channel along the same well"
        where = f"along the {place} (curvature {curvature:.3g})"
        measured, predicted = (of[low][c] / of[base][c] for c in ("measured", "exact"))
        took = f"{_known(measured)} times the steps of γ = {base:g}"
        if low == base:
            measured, predicted = of[low]["measured"], of[low]["exact"]
            took = f"{_known(measured)} steps"
        wanted = "no formula predicts it" if math.isnan(predicted) else f"predicted {_known(predicted)}"
        said.append(f"{where} escape takes {took}, {wanted}")
    gamma = min(row["gamma"] for row in rows)
    return f"NSGD, {verdict(checks) if tested else 'not resolved'}: with γ = {gamma:g} {'; '.join(said)}."


def _share(files: Files) -> str:
    rows = sorted(files.of("share", origin="both"), key=lambda row: row["batch_size"])
    word = verdict((row["measured"], row["standard_error"], _predicted(row)) for row in rows)
    majority = sum(row["measured"] - 2 * row["standard_error"] > 0.5 for row in rows)
    largest = rows[-1]["batch_size"]
    sharp, flat = (files.of("share", origin=origin, batch_size=largest)[0]["measured"] for origin in ("sharp", "flat"))
    memory = (
        f"; at the largest, walkers remember after {rows[-1]['steps']:,} steps where they began: {sharp:.0%} of those "
        f"from the sharp minimum and {flat:.0%} of those from the flat one are there"
        if flat - sharp > 0.05
        else ""
    )
    return (
        f"Flat minimum, {word}: at batch sizes {_range((row['batch_size'] for row in rows), 'g')} its share of the "
        f"time, extrapolated from both minima, is {_range((row['measured'] for row in rows), '.1%')}, predicted "
        f"{_range(map(_predicted, rows), '.1%')}, and surely above half at {majority} of {len(rows)}{memory}."
    )


def _loss(files: Files) -> str:
    rows = sorted(files.of("loss"), key=_inverse, reverse=True)
    word = verdict((row["measured"], row["standard_error"], _predicted(row)) for row in rows)
    first, last = rows[0], rows[-1]
    moves = "rises" if last["measured"] > first["measured"] else "does not rise"
    return (
        f"Price of a large η/B, {word}: the mean loss above the minimum {moves} from {_known(first['measured'])} at "
        f"η/B = {1 / _inverse(first):.2g} to {_known(last['measured'])} at {1 / _inverse(last):.2g}, predicted "
        f"{_known(_predicted(first))} and {_known(_predicted(last))}."
    )


# -- tables ----------------------------------------------------------------------------------------------------------


def _tables(files: Files) -> list[dict[str, Any]]:
    """A title, a header and rows of text each."""
    barrier = files.landscape["barrier"]
    escapes = [
        [
            f"{row['lr']:g}",
            f"{row['batch_size']:g}",
            f"{_inverse(row):.4g}",
            f"{barrier / row['temperature']:.3g}",
            *_steps(row),
            _number(row["leading"]),
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
        shares += [_estimate(row, 100), _number(100 * _predicted(row))]
        stays.append([f"{size:g}", *shares, _estimate(loss), _number(_predicted(loss))])
    damped = [[row["damped"], f"{row['gamma']:g}", *_steps(row)] for row in files.of("damped escape")]
    steps = ["arrived", "steps", "quadrature"]
    return [
        {
            "title": f"Escape from the {files.landscape['names']['start']} minimum to the other one",
            "header": ["lr", "B", "B/η", "Δf/T", *steps, "Kramers"],
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


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _estimate(row: dict[str, Any], scale: float = 1) -> str:
    value, twice = scale * row["measured"], 2 * scale * row["standard_error"]
    if not math.isfinite(value):
        return "unknown"
    return f"{_number(value)} ± {twice:,.0f}" if twice >= 10 else f"{_number(value)} ± {twice:#.2g}".rstrip(".")


def _steps(row: dict[str, Any]) -> list[str]:
    """Share that arrived, steps, and what the quadrature says."""
    return [f"{row['arrived'] / row['walkers']:.1%}", _estimate(row), _number(row["exact"])]


# -- figures ---------------------------------------------------------------------------------------------------------


def _points(axes: Axes, x: list[float], y: list[float], errors: list[float], **options: Any) -> None:
    twice = 2 * np.array(errors)
    axes.errorbar(x, y, yerr=twice, linestyle="none", capsize=2.5, markersize=5, **options)


def _line(axes: Axes, x: list[float], y: list[float], style: str, **options: Any) -> None:
    if not all(math.isnan(value) for value in y):
        order = np.argsort(x)
        axes.plot(np.array(x)[order], np.array(y)[order], style, linewidth=1.2, zorder=1, **options)


def _escape_figure(files: Files) -> Figure:
    figure, (times, damped) = new_figure(2)
    rows = files.of("escape")
    first = [row for row in rows if row["lr"] == files.config["lr"][0]]
    x = [_inverse(row) for row in first]
    _line(times, x, [row["exact"] * row["lr"] for row in first], "-", color="black", label="quadrature")
    leading = [row["leading"] * row["lr"] for row in first]
    _line(times, x, leading, "--", color="black", label="Eyring-Kramers, slope 2Δf/σ²")
    for i, lr in enumerate(files.config["lr"]):
        seen = [row for row in rows if row["lr"] == lr and row["arrived"] >= FEWEST]
        y, errors = ([row[c] * lr for row in seen] for c in ("measured", "standard_error"))
        style = {"marker": "os^Dv"[i % 5], "color": _COLORS[i % 5], "fillstyle": "none" if i % 2 else "full"}
        _points(times, [_inverse(row) for row in seen], y, errors, label=f"SGD, η = {lr:g}", **style)
    times.set(yscale="log", xlabel="B / η", ylabel="escape time, η × steps", title="Time to the other minimum")
    times.legend(frameon=False, fontsize=8)
    for i, name in enumerate(files.landscape["damped"]):
        of = [row for row in files.of("damped escape") if row["damped"] == name]
        _line(damped, [row["gamma"] for row in of], [row["exact"] for row in of], "-", color=_COLORS[i])
        seen = [row for row in of if row["arrived"] >= FEWEST]
        y, errors = ([row[c] for row in seen] for c in ("measured", "standard_error"))
        gammas = [row["gamma"] for row in seen]
        _points(damped, gammas, y, errors, marker="os"[i % 2], color=_COLORS[i], label=f"{name} damped")
    damped.set(yscale="log", xlabel="γ, factor on the step along one direction", ylabel="steps to escape", title="NSGD")
    damped.legend(frameon=False, fontsize=8, title="line: predicted", title_fontsize=8)
    return figure


def _stay_figure(files: Files) -> Figure:
    figure, (shares, losses) = new_figure(2)
    both = files.of("share", origin="both")
    sizes = [row["batch_size"] for row in both]
    _line(shares, sizes, [100 * row["exact"] for row in both], "-", color="black", label="Gibbs")
    _line(shares, sizes, [100 * row["leading"] for row in both], ":", color="black", label="Laplace, free of B and η")
    for origin, marker, color in (("sharp", "^", "#e69f00"), ("flat", "v", "#56b4e9")):
        of = files.of("share", origin=origin)
        y, errors = ([100 * row[c] for row in of] for c in ("measured", "standard_error"))
        label = f"from the {origin} one, after {of[0]['steps']:,} steps"
        _points(shares, [row["batch_size"] for row in of], y, errors, marker=marker, color=color, label=label)
    y, errors = ([100 * row[c] for row in both] for c in ("measured", "standard_error"))
    _points(shares, sizes, y, errors, marker="o", color=_COLORS[0], label="from both, extrapolated")
    shares.set(ylim=(0, 100), xlabel="batch size", ylabel="walkers at the flat minimum, %", title="Where SGD stays")
    shares.legend(frameon=False, fontsize=8)
    rows = files.of("loss")
    x = [1 / _inverse(row) for row in rows]
    _line(losses, x, [row["exact"] for row in rows], "-", color="black", label="quadrature")
    _line(losses, x, [row["leading"] for row in rows], ":", color="black", label="quadratic minima")
    y, errors = ([row[c] for row in rows] for c in ("measured", "standard_error"))
    _points(losses, x, y, errors, marker="o", color=_COLORS[0], label="SGD")
    losses.set(xlabel="η / B", ylabel="mean loss above the minimum", title="What a large η/B costs")
    losses.set_ylim(bottom=0)
    losses.ticklabel_format(axis="x", style="sci", scilimits=(0, 0))
    losses.legend(frameon=False, fontsize=8)
    return figure
