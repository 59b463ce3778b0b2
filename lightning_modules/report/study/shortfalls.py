"""Where NSGD did not help, as a table: for each method of its kind what was not better, or dearer, than the first."""

from __future__ import annotations

import math
from typing import Any

from lightning_modules.report.study.files import Files
from lightning_modules.report.study.numbers import MISSING, aim, amount, and_, count, standing
from lightning_modules.support.read_outs import label_of
from lightning_modules.support.score import COSTS

_NOUNS = {"step": "steps", "gradients": "gradients", "seconds": "seconds"}


def shortfalls_words(files: Files) -> list[str]:
    """What the table lists, or why there is none."""
    base = files.label(files.base)
    if files.judged:
        everywhere = [files.label(method) for method in files.judged if not any(_row(files, method).values())]
        rule = (
            "Listed is every read-out and measure in which a method that damps the sharpest directions was not "
            f"significantly better than {base}, and every cost in which it was dearer."
        )
        better = f"significantly better than {base} in every read-out and measure, and in no cost dearer"
        return [rule, *([f"{and_(everywhere)}: {better}."] if everywhere else [])]
    if files.styles[files.base].damps:
        return [f"{base} is what others are compared with here, and so is not judged; for that put another first."]
    return ["No method of this study damps the sharpest directions, so there is nothing to say of NSGD."]


def shortfalls_table(files: Files) -> dict[str, Any]:
    """A row for each method: in what it was worse, no different or not tested, what cost more, and what was lost."""
    kinds = {"worse": "significantly worse in", "n.s.": "no significant difference in", "no test": "no test of"}
    rows = {method: row for method in files.judged if any((row := _row(files, method)).values())}
    columns = {**kinds, "dearer": "dearer", "lost": "runs"}
    shown = [name for name in columns if name == "dearer" or any(row.get(name) for row in rows.values())]
    return {
        "title": f"Not significantly better than {files.label(files.base)}, or dearer",
        "header": ["method", *(columns[name] for name in shown)],
        "rows": [[files.label(method), *(row.get(name) or MISSING for name in shown)] for method, row in rows.items()],
        "cards": True,
    }


def _row(files: Files, method: str) -> dict[str, str]:
    """What the table says of a method, by column; nothing where it helped everywhere."""
    return {**_not_better(files, method), **_rest(files, method)}


def _not_better(files: Files, method: str) -> dict[str, str]:
    """Measures by what their tests say, with the read-outs where that is not all of them."""
    found: dict[str, list[str]] = {}
    for measure in files.measures:
        entries = [entry for entry in files.entries(measure.column) if entry["method"] == method and entry["n"]]
        kinds: dict[str, list[str]] = {}
        for entry in entries:
            kinds.setdefault(standing(entry, measure), []).append(label_of(entry["read_out"]))
        kinds.pop("better", None)
        for kind, places in kinds.items():
            where = f" ({', '.join(places)})" if len(places) < len(entries) else ""
            found.setdefault(kind, []).append(f"{measure.label}{where}")
    return {kind: ", ".join(names) for kind, names in found.items()}


def _rest(files: Files, method: str) -> dict[str, str]:
    seeds = files.config["seeds"]
    died = seeds - len(files.last(method))
    lost = [f"{n} {how}" for n, how in ((died, "died"), (len(files.failed[method]) - died, "diverged")) if n]
    return {
        "dearer": "; ".join([*_dearer(files, method), *_slower(files, method)]),
        "lost": f"of {count(seeds, 'run')} {and_(lost)}" if lost else "",
    }


def _dearer(files: Files, method: str) -> list[str]:
    cost, base = files.cost(method), files.cost(files.base)
    if cost is None or base is None:
        return []
    return [
        f"{cost[name] / base[name]:.2f} times the {name} of a run ({amount(cost[name])} against {amount(base[name])})"
        for name in ("gradients", "seconds")
        if cost[name] > base[name]
    ]


def _slower(files: Files, method: str) -> list[str]:
    """Where the target cost more, or was reached less often."""
    if files.target is None or not files.last(method):
        return []
    (reached, runs, costs), (base_reached, base_runs, base) = files.to_target(method), files.to_target(files.base)
    aimed, words = aim(files, files.target), []
    if reached < base_reached:
        reference = f"with {files.label(files.base)} in {base_reached} of {base_runs}"
        words.append(f"{aimed} in {reached} of {runs} runs, {reference}")
    more = [
        f"{costs[name] / base[name]:.2f} times the {_NOUNS[name]} (median {amount(costs[name])} against "
        f"{amount(base[name])})"
        for name in COSTS
        if base[name] < costs[name] < math.inf
    ]
    return [*words, *([f"to {aimed} {and_(more)}"] if more else [])]
