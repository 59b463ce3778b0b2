"""The tables of a study's report: a title, a header and rows of text each."""

from __future__ import annotations

from typing import Any

from lightning_modules.report.study.files import Files
from lightning_modules.report.study.numbers import (
    MISSING,
    aim,
    aimed,
    amount,
    and_,
    change_of,
    count,
    mean_of,
    seeds_of,
    standing,
    test_of,
    to_show,
    upper,
)
from lightning_modules.report.study.rates import sensitivity_table
from lightning_modules.report.study.spectrum import spectrum_tables
from lightning_modules.support.read_outs import label_of
from lightning_modules.support.score import Measure

Table = dict[str, Any]

TEST = "paired t-test"
PRODUCTS = "Hessian-vector products"
STATE = "optimizer's state / parameters"
TEXT_COLUMNS = (
    *("weights", "method", TEST, "settings", "schedule", "dearer", "runs"),
    *("significantly worse in", "no significant difference in", "no test of"),
)
SHOWN = ("last", "ema", "swa")  # read-outs of the one table


def shown_measures(files: Files) -> list[Measure]:
    """The endpoint, and what stands beside it."""
    return [files.endpoint, *([] if files.secondary is None else [files.secondary])]


# -- the one table -------------------------------------------------------------------------------------------------


def overview(files: Files) -> Table:
    """Methods down; across the endpoint for the last weights and their averages, what is beside it, and the cost."""
    score, *beside = shown_measures(files)
    found = {(entry["method"], entry["read_out"], entry["measure"]): entry for entry in files.summary}
    read_outs = _shown_read_outs(files)
    rows = []
    for method in files.methods:
        name = f"{files.label(method)}\ncontrol" if files.styles[method].control else files.label(method)
        cells = [_cell(files, found.get((method, read_out, score.column)), score) for read_out in read_outs]
        cells += [_cell(files, found.get((method, "last", measure.column)), measure) for measure in beside]
        rows.append([name, *cells, *_cost_cells(files, method)])
    names = [measure.label for measure in beside]
    reach = [] if files.target is None else [f"to {aimed(files, files.target)}"]
    return {
        "title": f"{upper(score.header)}, of the last weights and of their averages, with {and_([*names, 'cost'])}",
        "header": ["method", *(label_of(name) for name in read_outs), *(m.header for m in beside), *reach, "a run"],
        "rows": rows,
        "cards": True,
    }


def short_table(files: Files) -> Table:
    """Of a terminal: the endpoint alone, and of each change what the test says in a word."""
    score, base = files.endpoint, files.label(files.base)
    entries = {(entry["method"], entry["read_out"]): entry for entry in files.entries(score.column)}
    read_outs = _shown_read_outs(files)
    against = f"; better or worse than {base}, or not significantly so (n.s.)" if files.methods[1:] else ""
    rows = []
    for method in files.methods:
        name = f"{files.label(method)} (control)" if files.styles[method].control else files.label(method)
        failed = f"\n{len(files.failed[method])} of {count(files.config['seeds'], 'seed')} failed"
        name += failed if files.failed[method] else ""
        rows.append([name, *(_short_cell(files, entries.get((method, read_out)), score) for read_out in read_outs)])
    return {
        "title": f"{upper(score.header)}, mean over {count(files.config['seeds'], 'seed')}{against}",
        "header": ["method", *(label_of(name) for name in read_outs)],
        "rows": rows,
    }


def _short_cell(files: Files, entry: dict[str, Any] | None, measure: Measure) -> str:
    if entry is None:
        return MISSING
    mean, compared = mean_of(entry, measure, interval=False), entry["method"] != files.base and entry["pairs"]
    return f"{mean} {standing(entry, measure)}" if compared and mean != "diverged" else mean


def _shown_read_outs(files: Files) -> list[str]:
    return [name for name in SHOWN if any(entry["read_out"] == name for entry in files.summary)]


def _cell(files: Files, entry: dict[str, Any] | None, measure: Measure) -> str:
    """The mean, and below it the change from the first method, shortly, and what failed."""
    if entry is None:
        return MISSING
    alone = entry["method"] == files.base or not entry["pairs"]
    lines = [mean_of(entry, measure, interval=alone)]  # one interval is enough: the change's
    if not alone and lines != ["diverged"]:
        lines.append(f"{change_of(entry, measure)} {standing(entry, measure)}")
    return "\n".join([*lines, *filter(None, [seeds_of(entry)])])


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
    """The endpoint, what is beside it, costs, sensitivity to the learning rate, and curvature where runs ended."""
    tables = [*(_scores(files, measure) for measure in shown_measures(files)), _costs(files)]
    if files.target is not None:
        tables.append(_target(files, files.target))
    if files.sweep:
        tables.append(sensitivity_table(files))
    return [*tables, *spectrum_tables(files)]


def _scores(files: Files, measure: Measure) -> Table:
    compared = len(files.methods) > 1
    rows, above = [], ""
    for entry in files.entries(measure.column):
        name = label_of(entry["read_out"])
        mean = "\n".join(filter(None, [mean_of(entry, measure), seeds_of(entry)]))
        row = [name if name != above else "", files.label(entry["method"]), mean]
        if compared:
            is_base = entry["method"] == files.base
            row += [""] * 3 if is_base else [change_of(entry, measure), test_of(entry), to_show(entry)]
        rows.append(row)
        above = name
    against = f"{'over' if files.effect(measure) == 'ratio' else 'minus'} {files.label(files.base)}"
    rank = "the endpoint, with the last weights" if measure == files.endpoint else "secondary"
    return {
        "title": f"{upper(measure.header)}: {rank}",
        "header": ["weights", "method", "mean", *([against, TEST, "seeds to show it"] if compared else [])],
        "rows": rows,
    }


def _costs(files: Files) -> Table:
    columns = {
        "step": "steps",
        "gradients": "gradients",
        "seconds": "seconds",
        "refreshes": "refreshes",
        "hvps": PRODUCTS,
        "state": STATE,
    }
    costs = {method: files.cost(method) for method in files.methods}
    if not any(cost is not None and "state" in cost for cost in costs.values()):  # of a study of before
        del columns["state"]
    rows = []
    for method, cost in costs.items():
        cells = [MISSING if cost is None or name not in cost else amount(cost[name]) for name in columns]
        rows.append([files.label(method), *cells])
    return {"title": "Cost of a run: medians over seeds", "header": ["method", *columns.values()], "rows": rows}


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
