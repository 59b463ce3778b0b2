"""The tables of a study's report: a title, a header and rows of text each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_modules.methods import RECIPES, Settings
from lightning_modules.report_files import READ_OUTS, Files, label
from lightning_modules.rows import Rows
from lightning_modules.statistics import stable_range

Table = dict[str, Any]

SIGNIFICANT = 0.05
MEASURES = {  # name, factor, digits, unit, unit of differences
    "test_accuracy": ("test accuracy", 100, 1, " %", " points"),
    "val_accuracy": ("validation accuracy", 100, 1, " %", " points"),
    "train_loss": ("training loss", 1, 4, "", ""),
}
TEST = "paired t-test"
ACCURACY, PRODUCTS = "validation accuracy, %", "Hessian-vector products"
TEXT_COLUMNS = ("weights", "method", TEST, "settings")
_MISSING = "–"


def main_tables(files: Files) -> list[Table]:
    """Accuracy, training loss, cost of a run, cost to the target, and sensitivity to the learning rate."""
    tables = [_scores(files, "test_accuracy", "Test accuracy, %"), _scores(files, "train_loss", "Training loss")]
    tables.append(_costs(files))
    if files.target is not None:
        tables.append(_target(files, files.target))
    if files.sweep:
        tables.append(_sensitivity(files))
    return tables


def settings_table(files: Files) -> Table:
    """What each method trained with, and the trials that it comes from."""
    return _tuning(files) if files.tuning else _given(files)


def minus(files: Files) -> str:
    """Header of the differences."""
    return f"minus {label(files.base)}"


# -- text of numbers -----------------------------------------------------------------------------------------------


def estimate(value: float, half: float, factor: float, digits: int, sign: str = "") -> str:
    """A value with the half-width of its interval, where it has one; "diverged" where it is not finite."""
    if not math.isfinite(value):
        return "diverged"
    kind = f".{digits}f" if abs(value * factor) < 1e4 else ".2e"
    text = f"{value * factor:{sign}{kind}}"
    return text if math.isnan(half) else f"{text} ± {half * factor:{kind}}"


def mean_of(entry: Mapping[str, Any]) -> str:
    """The mean of a row of the summary, without unit."""
    _, factor, digits, *_ = MEASURES[entry["measure"]]
    return estimate(entry["mean"], entry["half_width"], factor, digits)


def difference_of(entry: Mapping[str, Any]) -> str:
    """Its difference to the first method, without unit; empty where no seed has both."""
    _, factor, digits, *_ = MEASURES[entry["measure"]]
    if not entry["pairs"]:
        return ""
    return estimate(entry["difference"], entry["difference_half_width"], factor, digits, "+")


def verdict(entry: Mapping[str, Any]) -> str:
    """What the test says of the difference."""
    p = entry["p_holm"]
    if math.isnan(p):
        return "no test"  # one pair, a run that diverged, or the same difference for every seed
    return f"{'significant' if p < SIGNIFICANT else 'no significant difference'} (p = {p:.2g})"


def amount(value: float) -> str:
    """A cost."""
    if math.isinf(value):
        return "not reached"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def percent(share: float) -> str:
    """An accuracy that was aimed at."""
    return f"{100 * share:.4g} %"


def settings_of(settings: Settings) -> str:
    """Hyperparameters as they were used."""
    return ", ".join(f"{name} {round(v) if name == 'k' else v:g}" for name, v in settings.items())


# -- results -------------------------------------------------------------------------------------------------------


def _scores(files: Files, measure: str, title: str) -> Table:
    compared = len(files.methods) > 1
    rows, above = [], ""
    for entry in files.entries(measure):
        name = READ_OUTS[entry["read_out"]]
        row = [name if name != above else "", label(entry["method"]), mean_of(entry)]
        if compared:
            row += ["", ""] if entry["method"] == files.base else [difference_of(entry), verdict(entry)]
        rows.append(row)
        above = name
    return {
        "title": title,
        "header": ["weights", "method", "mean", *([minus(files), TEST] if compared else [])],
        "rows": rows,
    }


def _costs(files: Files) -> Table:
    columns = {
        "step": "steps",
        "gradients": "gradients",
        "seconds": "seconds",
        "refreshes": "refreshes",
        "hvps": PRODUCTS,
    }
    rows = []
    for method in files.methods:
        cost = files.cost(method)
        rows.append([label(method), *(_MISSING if cost is None else amount(cost[name]) for name in columns)])
    return {"title": "Cost of a run", "header": ["method", *columns.values()], "rows": rows}


def _target(files: Files, target: float) -> Table:
    rows = []
    for method in files.methods:
        reached, runs, medians = files.to_target(method)
        rows.append([label(method), f"{reached} of {runs}", *(amount(value) for value in medians.values())])
    own = f", that of {label(files.base)}'s best trial" if files.config["target"] is None else ""
    return {
        "title": f"Cost to {percent(target)} validation accuracy{own}: medians over seeds",
        "header": ["method", "reached", "steps", "gradients", "seconds"],
        "rows": rows,
    }


# -- learning rates ------------------------------------------------------------------------------------------------


def _given(files: Files) -> Table:
    rows = [[label(m), settings_of(files.settings[m])] for m in files.methods]
    return {"title": "Settings, as given", "header": ["method", "settings"], "rows": rows}


def _tuning(files: Files) -> Table:
    rows = []
    for method in files.methods:
        own = RECIPES[method].more_of
        if own:
            found = [f"as {label(own[0])}", settings_of(files.settings[method]), "", ""]
        else:
            losses = [_finite(row["val_loss"]) for row in files.tuning if row["method"] == method]
            ends = [estimate(value, math.nan, 1, 4) for value in (min(losses), float(np.median(losses)))]
            found = [str(len(losses)), settings_of(files.settings[method]), *ends]
        rows.append([label(method), *found])
    return {
        "title": "Settings, the best of each method's trials by validation loss",
        "header": ["method", "trials", "settings", "validation loss of the best", "of the median trial"],
        "rows": rows,
    }


def _sensitivity(files: Files) -> Table:
    rows = []
    for method in files.methods:
        own = [row for row in files.sweep if row["method"] == method]
        if own:
            rows.append([label(method), *_stability(own), *_best_rate(own)])
    return {
        "title": "Learning rates that lower the loss, and the best by validation loss with what it gives",
        "header": ["method", "stable from", "to", "decades", "best", "training loss", ACCURACY],
        "rows": rows,
    }


def _stability(rows: Rows) -> list[str]:
    """Ends of the longest unbroken range of rates that lower the loss, and its decades."""
    starts = [row["start_loss"] for row in rows if "start_loss" in row]
    stable = stable_range(rows, starts[0]) if starts else None
    if stable is None:
        return [_MISSING] * 3
    rates, (low, high) = [row["lr"] for row in rows], stable
    more = "≥ " if low == min(rates) or high == max(rates) else ""  # it may go on beyond the grid
    return [f"{low:g}", f"{high:g}", f"{more}{math.log10(high / low):.2f}"]


def _best_rate(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rate of least validation loss, with training loss and validation accuracy there."""
    best = min(rows, key=lambda row: _finite(row.get("val_loss", math.nan)))
    if math.isinf(_finite(best.get("val_loss", math.nan))):
        return [_MISSING] * 3
    return [f"{best['lr']:g}", estimate(best["train_loss"], math.nan, 1, 4), f"{100 * best['val_accuracy']:.1f}"]


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
