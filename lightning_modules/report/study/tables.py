"""The tables of a study's report: a title, a header and rows of text each."""

from __future__ import annotations

from typing import Any

from lightning_modules.report.study.files import READ_OUTS, Files
from lightning_modules.report.study.numbers import (
    MISSING,
    aim,
    aimed,
    amount,
    difference_of,
    estimate,
    mean_of,
    standing,
    test_of,
    upper,
)
from lightning_modules.report.study.rates import sensitivity_table
from lightning_modules.support.score import TRAIN_LOSS, Measure

Table = dict[str, Any]

TEST = "paired t-test"
PRODUCTS = "Hessian-vector products"
TEXT_COLUMNS = (
    *("weights", "method", TEST, "settings", "schedule", "dearer", "runs"),
    *("significantly worse in", "no significant difference in", "no test of"),
)
SHOWN = ("last", "ema", "swa")  # read-outs of the one table


def shown_measures(files: Files) -> list[Measure]:
    """The main one, that of a test where there was one, and the training loss."""
    return [measure for i, measure in enumerate(files.measures) if i == 0 or measure == TRAIN_LOSS]


# -- the one table -------------------------------------------------------------------------------------------------


def overview(files: Files) -> Table:
    """Methods down; across the score of the last weights and of their averages, the loss, and what it cost."""
    score = files.measures[0]
    found = {(entry["method"], entry["read_out"], entry["measure"]): entry for entry in files.summary}
    read_outs = [name for name in SHOWN if any(entry["read_out"] == name for entry in files.summary)]
    rows = []
    for method in files.methods:
        name = f"{files.label(method)}\ncontrol" if files.styles[method].control else files.label(method)
        cells = [_cell(files, found.get((method, read_out, score.column)), score) for read_out in read_outs]
        loss = [] if score == TRAIN_LOSS else [_cell(files, found.get((method, "last", TRAIN_LOSS.column)), TRAIN_LOSS)]
        rows.append([name, *cells, *loss, *_cost_cells(files, method)])
    losses = [] if score == TRAIN_LOSS else [TRAIN_LOSS.label]
    reach = [] if files.target is None else [f"to {aimed(files, files.target)}"]
    return {
        "title": f"{upper(score.header)}, of the last weights and of their averages, with loss and cost",
        "header": ["method", *(READ_OUTS[name] for name in read_outs), *losses, *reach, "a run"],
        "rows": rows,
        "cards": True,
    }


def _cell(files: Files, entry: dict[str, Any] | None, measure: Measure) -> str:
    """The mean, and below it the difference to the first method, shortly."""
    if entry is None:
        return MISSING
    if entry["method"] == files.base or not entry["pairs"]:
        return mean_of(entry, measure)
    # One interval is enough: the difference's.
    mean = estimate(entry["mean"], float("nan"), measure.factor, measure.digits)
    return mean if mean == "diverged" else f"{mean}\n{difference_of(entry, measure)} {standing(entry, measure)}"


def _cost_cells(files: Files, method: str) -> list[str]:
    """Steps and seconds to the target, where there is one, and of a run."""
    cost = files.cost(method)
    run = MISSING if cost is None else f"{amount(cost['seconds'])} s\n{amount(cost['step'])} steps"
    if files.target is None:
        return [run]
    _, _, medians = files.to_target(method)
    never = medians["step"] == float("inf")
    reached = "not reached" if never else f"{amount(medians['seconds'])} s\n{amount(medians['step'])} steps"
    return [reached, run]


# -- all of it -----------------------------------------------------------------------------------------------------


def main_tables(files: Files) -> list[Table]:
    """The main score, training loss, cost of a run, cost to the target, and sensitivity to the learning rate."""
    tables = [*(_scores(files, measure) for measure in shown_measures(files)), _costs(files)]
    if files.target is not None:
        tables.append(_target(files, files.target))
    if files.sweep:
        tables.append(sensitivity_table(files))
    return tables


def _scores(files: Files, measure: Measure) -> Table:
    compared = len(files.methods) > 1
    rows, above = [], ""
    for entry in files.entries(measure.column):
        name = READ_OUTS[entry["read_out"]]
        row = [name if name != above else "", files.label(entry["method"]), mean_of(entry, measure)]
        if compared:
            row += ["", ""] if entry["method"] == files.base else [difference_of(entry, measure), test_of(entry)]
        rows.append(row)
        above = name
    return {
        "title": upper(measure.header),
        "header": ["weights", "method", "mean", *([f"minus {files.label(files.base)}", TEST] if compared else [])],
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
        rows.append([files.label(method), *(MISSING if cost is None else amount(cost[name]) for name in columns)])
    return {"title": "Cost of a run", "header": ["method", *columns.values()], "rows": rows}


def _target(files: Files, target: float) -> Table:
    rows = []
    for method in files.methods:
        reached, runs, medians = files.to_target(method)
        rows.append([files.label(method), f"{reached} of {runs}", *(amount(value) for value in medians.values())])
    whose = f", that of {files.label(files.base)}'s best trial" if files.config["target"] is None else ""
    return {
        "title": f"Cost to {aim(files, target)}{whose}: medians over seeds",
        "header": ["method", "reached", "steps", "gradients", "seconds"],
        "rows": rows,
    }
