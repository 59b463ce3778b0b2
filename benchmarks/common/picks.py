"""README's table of what did best where: the drop-in beside what a user would pick instead, setting by setting."""

from __future__ import annotations

import importlib
import math
from typing import Any

from common import RESULTS
from common.documents import markdown, wrapped
from common.plans import Kept
from lightning_modules.report.study.numbers import SIGNIFICANT, estimate
from lightning_modules.support.files import read_csv

_HEADER = ["where, and judged by", "SGD with momentum", "**NSGD**", "AdamW", "Muon", "pick"]
_METHODS = {  # by their names in time_to_target.py, those in studies
    "SGD, momentum": "sgd-momentum",
    "NSGD, momentum": "nsgd-momentum",
    "AdamW": "adamw",
    "Muon": "muon",
}
# Studies of cifar10.py, in the order of the table, and what their task is called; one that is not kept has no row.
_STUDIES = {
    "claim/resnet-32-plain-1024": "ResNet-32 without BatchNorm, batch 1,024, on a GPU",
    "batch-scaled/resnet-32-plain-1024": "half-width ResNet-32 without BatchNorm at 8 px, batch 1,024",
    "batch-scaled/resnet-32-plain-128": "half-width ResNet-32 without BatchNorm at 8 px, batch 128",
    "batch-scaled/resnet-20-512": "half-width ResNet-20 with BatchNorm at 8 px, batch 512",
    "batch-scaled/vit-512": "half-width vision transformer at 8 px, batch 512",
    "language-scaled/language-64": "transformer on characters, batch 64",
    "language-scaled/language-512": "transformer on characters, batch 512",
}


def picks() -> str:
    """The table, and what its numbers are."""
    rows = [*_to_a_loss(), *(_row(kept, task) for kept, task in _kept())]
    words = (
        "Seconds: to the loss at which tuned SGD with momentum ends, as a share of all that it takes; medians, from "
        "`benchmarks/results/time_to_target.csv`. The others: means over seeds at the end, or of a study that is not "
        "finished the best trial of one seed; each rate is tuned by one rule; from `benchmarks/results/cifar10/`. "
        "Picked: what of all methods did best; where that is not significantly better than SGD it is marked n.s., and "
        "followed by the best of those that are; of seconds and trials there is no test. Intervals and more methods: "
        "[benchmarks/README.md](benchmarks/README.md)."
    )
    return f"{markdown(_HEADER, rows)}\n\n{wrapped(words)}"


def _kept() -> list[tuple[Kept, str]]:
    studies = [(Kept(RESULTS / "cifar10" / name), task) for name, task in _STUDIES.items()]
    return [(kept, task) for kept, task in studies if (kept.folder / "config.yaml").exists()]


def _to_a_loss() -> list[list[str]]:
    """Seconds to the loss of tuned SGD, with a constant rate."""
    _, found = importlib.import_module("time_to_target").table(read_csv(RESULTS / "time_to_target.csv"))
    seconds: dict[str, dict[str, str]] = {}
    for name, _, _, _, _, target, *_ in found:
        case, _, method = name.partition(": ")
        if "cosine" not in case:
            seconds.setdefault(case, {})[method] = target.partition(" / ")[2] or "not reached"
    body = []
    for case, by in seconds.items():
        reached = [method for method in by if by[method] != "not reached"]  # tuned SGD reaches its own loss
        best = min(reached, key=lambda method: float(by[method]))
        body.append([f"{case}: seconds", *(by[method] for method in _METHODS), best])
    return body


def _row(kept: Kept, task: str) -> list[str]:
    """Of a study: what the methods ended with, and which of all did best."""
    files = kept.files
    measure = files.endpoint if kept.finished else files.score.validation

    def end(method: str) -> dict[str, Any]:
        if kept.finished:
            return kept.entries[measure.column, method]
        return {"mean": kept.best_trial(method).get(measure.column, math.nan), "p_holm": 0.0}

    ends = {method: end(method) for method in files.methods if not files.styles[method].control}
    badness = {method: measure.badness({measure.column: row["mean"]}) for method, row in ends.items()}
    ahead = [m for m in ends if badness[m] < badness[files.base]]
    better = [m for m in ahead if ends[m]["p_holm"] < SIGNIFICANT]
    best = min(ahead, key=badness.__getitem__, default=files.base)
    pick = files.label(best)
    if ahead and best not in better:
        surest = min(better, key=badness.__getitem__, default=None)
        pick += " (n.s.)" + (f", {files.label(surest)}" if surest else "")
    digits = min(measure.digits, 2)
    shown = [estimate(ends[method]["mean"], math.nan, measure.factor, digits) for method in _METHODS.values()]
    where = task if kept.finished else f"{task} (trials)"
    return [f"{where}: {measure.header}", *shown, pick]
