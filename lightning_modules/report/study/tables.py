"""The tables of a study's report: a title, a header and rows of text each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_modules.report.study.files import READ_OUTS, Files, label
from lightning_modules.study.methods import RECIPES, Settings
from lightning_modules.study.statistics import stable_range
from lightning_modules.support.files import Rows
from lightning_modules.support.score import TRAIN_LOSS, Measure

Table = dict[str, Any]

SIGNIFICANT = 0.05
TEST = "paired t-test"
PRODUCTS = "Hessian-vector products"
TEXT_COLUMNS = ("weights", "method", TEST, "settings")
_MISSING = "–"


def main_tables(files: Files) -> list[Table]:
    """The main score, training loss, cost of a run, cost to the target, and sensitivity to the learning rate."""
    tables = [*(_scores(files, measure) for measure in shown_measures(files)), _costs(files)]
    if files.target is not None:
        tables.append(_target(files, files.target))
    if files.sweep:
        tables.append(_sensitivity(files))
    return tables


def shown_measures(files: Files) -> list[Measure]:
    """The main one, that of a test where there was one, and the training loss."""
    return [measure for i, measure in enumerate(files.measures) if i == 0 or measure == TRAIN_LOSS]


def settings_table(files: Files) -> Table:
    """What each method trained with, and the trials that it comes from."""
    return _tuning(files) if files.tuning else _given(files)


def upper(words: str) -> str:
    """With a capital at the beginning."""
    return words[0].upper() + words[1:]


def minus(files: Files) -> str:
    """Header of the differences."""
    return f"minus {label(files.base)}"


# -- text of numbers -----------------------------------------------------------------------------------------------


def estimate(value: float, half: float, factor: float, digits: int, sign: str = "") -> str:
    """A value with the half-width of its interval, where it has one; "diverged" where it is not finite."""
    if not math.isfinite(value):
        return "diverged"
    size = abs(value * factor)
    small = digits > 1 and 1e-9 <= size < 5 * 10.0**-digits  # a few digits would say 0
    kind = ".2e" if small or size >= 1e4 else f".{digits}f"
    text = f"{value * factor:{sign}{kind}}"
    return text if math.isnan(half) else f"{text} ± {half * factor:{kind}}"


def mean_of(entry: Mapping[str, Any], measure: Measure) -> str:
    """The mean of a row of the summary, without unit."""
    return estimate(entry["mean"], entry["half_width"], measure.factor, measure.digits)


def difference_of(entry: Mapping[str, Any], measure: Measure) -> str:
    """Its difference to the first method, without unit; empty where no seed has both."""
    if not entry["pairs"]:
        return ""
    return estimate(entry["difference"], entry["difference_half_width"], measure.factor, measure.digits, "+")


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


def aim(files: Files, target: float) -> str:
    """What was aimed at, such as "90 % validation accuracy"."""
    measure = files.score.validation
    value = f"{measure.factor * target:.4g}{measure.unit}"
    return f"{value} {measure.label}" if measure.unit else f"a {measure.label} of {value}"


def settings_of(settings: Settings) -> str:
    """Hyperparameters as they were used."""
    return ", ".join(f"{name} {round(v) if name == 'k' else v:g}" for name, v in settings.items())


# -- results -------------------------------------------------------------------------------------------------------


def _scores(files: Files, measure: Measure) -> Table:
    compared = len(files.methods) > 1
    rows, above = [], ""
    for entry in files.entries(measure.column):
        name = READ_OUTS[entry["read_out"]]
        row = [name if name != above else "", label(entry["method"]), mean_of(entry, measure)]
        if compared:
            row += ["", ""] if entry["method"] == files.base else [difference_of(entry, measure), verdict(entry)]
        rows.append(row)
        above = name
    return {
        "title": upper(measure.header),
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
        "title": f"Cost to {aim(files, target)}{own}: medians over seeds",
        "header": ["method", "reached", "steps", "gradients", "seconds"],
        "rows": rows,
    }


# -- learning rates ------------------------------------------------------------------------------------------------


def _given(files: Files) -> Table:
    rows = [[label(m), settings_of(files.settings[m])] for m in files.methods]
    return {"title": "Settings, as given", "header": ["method", "settings"], "rows": rows}


def _tuning(files: Files) -> Table:
    measure = files.criterion
    rows = []
    for method in files.methods:
        own = RECIPES[method].more_of
        if own:
            found = [f"as {label(own[0])}", settings_of(files.settings[method]), "", ""]
        elif all(row["method"] != method for row in files.tuning):
            found = ["none", settings_of(files.settings[method]), "", ""]
        else:
            worse = [measure.badness(row) for row in files.tuning if row["method"] == method]
            sign = 1 if measure.lower_is_better else -1
            ends = [_printed(sign * value, measure) for value in (min(worse), float(np.median(worse)))]
            found = [str(len(worse)), settings_of(files.settings[method]), *ends]
        rows.append([label(method), *found])
    return {
        "title": f"Settings, the best of each method's trials by {measure.label}",
        "header": ["method", "trials", "settings", f"{measure.label} of the best", "of the median trial"],
        "rows": rows,
    }


def _sensitivity(files: Files) -> Table:
    rows = []
    for method in files.methods:
        own = [row for row in files.sweep if row["method"] == method]
        if own:
            rows.append([label(method), *_stability(own), *_best_rate(own, files)])
    return {
        "title": f"Learning rates that lower the loss, and the best by {files.criterion.label} with what it gives",
        "header": ["method", "stable from", "to", "decades", "best", "training loss", files.score.validation.header],
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


def _best_rate(rows: Sequence[Mapping[str, Any]], files: Files) -> list[str]:
    """The best rate, with training loss and score in validation there."""
    best = min(rows, key=files.criterion.badness)
    if math.isinf(files.criterion.badness(best)):
        return [_MISSING] * 3
    measure = files.score.validation
    return [f"{best['lr']:g}", _printed(best["train_loss"], TRAIN_LOSS), _printed(best[measure.column], measure)]


def _printed(value: float, measure: Measure) -> str:
    return estimate(value, math.nan, measure.factor, measure.digits)
