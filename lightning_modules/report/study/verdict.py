"""What a study says in one line, and whether a gain is more than averaging gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_modules.report.study.files import READ_OUTS, Files
from lightning_modules.report.study.numbers import aim, and_, estimate, standing, upper
from lightning_modules.report.verdicts import t_interval
from lightning_modules.support.score import TRAIN_LOSS, Measure

_AVERAGES = ("ema", "swa")
_FEW = 5  # seeds; with 4 the paired t-test finds a mean difference of 1.5 standard deviations in half of all studies
_EQUAL = 0.005  # of a cost: less is "as many"


def verdict(files: Files) -> str:
    """Lines: the score of the last weights, which a study is judged by; where the training loss differs; the cost."""
    if len(files.methods) == 1:
        return f"{files.label(files.base)} was trained alone: there is nothing to compare it with."
    loss = [] if files.measures[0] == TRAIN_LOSS else [_loss(files)]
    sentences = [_score(files), _power(files), *loss, _cost(files)]
    return "\n".join(sentence for sentence in sentences if sentence)


def _labels(files: Files, methods: Sequence[str]) -> str:
    return and_([files.label(method) for method in methods])


def _entries(files: Files, measure: Measure) -> dict[str, dict[str, Any]]:
    """Of the last weights, by method."""
    return {entry["method"]: entry for entry in files.entries(measure.column) if entry["read_out"] == "last"}


def _value(entry: dict[str, Any], measure: Measure) -> str:
    value = estimate(entry["mean"], math.nan, measure.factor, measure.digits)
    return value if value == "diverged" else f"{value}{measure.unit}"


def _score(files: Files) -> str:
    """Each subject against the first method, those of one kind together."""
    measure, base = files.measures[0], files.base
    entries = _entries(files, measure)
    kinds: dict[str, list[str]] = {}
    for method in files.subjects:
        kind = standing(entries[method], measure) if method in entries else "died"
        kinds.setdefault(kind, []).append(method)
    if base not in entries:
        return f"No run of {files.label(base)} survived, so there is nothing to compare with."
    reference = f"{files.label(base)} {_value(entries[base], measure)}"
    clauses, untested = [], "one seed allows no test" if files.config["seeds"] == 1 else "no test is possible"
    for kind, methods in kinds.items():
        if kind == "died":
            clauses.append(f"no run of {_labels(files, methods)} survived")
            continue
        values = f"{and_([f'{files.label(m)} {_value(entries[m], measure)}' for m in methods])} against {reference}"
        p = f"p {'=' if len(methods) == 1 else '≤'} {max(entries[m]['p_holm'] for m in methods):.2g}"
        clauses.append(
            {
                "n.s.": f"no significant difference in {measure.label}: {values}",
                "no test": f"{untested} of {measure.label}: {values}",
            }.get(kind, f"significantly {kind} in {measure.label}: {values} ({p})")
        )
    return f"{upper('; '.join(clauses))}."


def _power(files: Files) -> str:
    """That few seeds show little, where no difference was significant."""
    entries, seeds = _entries(files, files.measures[0]), files.config["seeds"]
    unclear = any(standing(entries[m], files.measures[0]) == "n.s." for m in files.subjects if m in entries)
    return f"With {seeds} seeds only a large difference would show." if unclear and seeds < _FEW else ""


def _loss(files: Files) -> str:
    """Where the training loss differs significantly; nothing elsewhere."""
    entries = _entries(files, TRAIN_LOSS)
    differ = [m for m in files.subjects if m in entries and standing(entries[m], TRAIN_LOSS) in ("better", "worse")]
    if not differ:
        return ""
    words = {"better": "lower", "worse": "higher"}
    clauses = [
        f"{words[standing(entries[m], TRAIN_LOSS)]} with {files.label(m)} ({_value(entries[m], TRAIN_LOSS)} against "
        f"{_value(entries[files.base], TRAIN_LOSS)})"
        for m in differ
    ]
    return f"The training loss is significantly {and_(clauses)}."


def _cost(files: Files) -> str:
    """Steps and seconds to the target, or those of a run where there is no target."""
    if files.target is not None and not any(files.to_target(m)[0] for m in (files.base, *files.subjects)):
        return f"{upper(aim(files, files.target))} was reached in no run."
    base, base_cost = files.label(files.base), files.cost(files.base)
    clauses = []
    for method in files.subjects:
        cost, label = files.cost(method), files.label(method)
        if cost is None or base_cost is None:
            continue
        if files.target is None:
            seconds = _compared(cost["seconds"], base_cost["seconds"], "seconds")
            clauses.append(f"a run of {label} took {seconds} {'as' if 'as many' in seconds else 'than'} {base}")
            continue
        reached, runs, median = files.to_target(method)
        base_reached, base_runs, base_median = files.to_target(files.base)
        if math.isinf(median["step"]) or math.isinf(base_median["step"]):
            clauses.append(f"{label} reached it in {reached} of {runs} runs, {base} in {base_reached} of {base_runs}")
            continue
        more = [
            _compared(median[name], base_median[name], noun)
            for name, noun in (("step", "steps"), ("seconds", "seconds"))
        ]
        clauses.append(f"{label} needed {and_(more)}")
    if not clauses:
        return ""
    if files.target is None:
        return f"{upper('; '.join(clauses))}."
    medians = f" (medians, against {base})" if any(" needed " in clause for clause in clauses) else ""
    return f"To {aim(files, files.target)}, {'; '.join(clauses)}{medians}."


def _compared(value: float, reference: float, noun: str) -> str:
    """A cost beside another: 12 % more, as many, 21 % fewer, 2.5 times as many."""
    ratio = value / reference
    if abs(ratio - 1) < _EQUAL:
        return f"as many {noun}"
    if ratio >= 2:
        return f"{ratio:.1f} times as many {noun}"
    return f"{abs(ratio - 1):.0%} {'more' if ratio > 1 else 'fewer'} {noun}".replace("%", " %")


# -- more than averaging gives? ------------------------------------------------------------------------------------


def beside_averages(files: Files) -> list[str]:
    """Each subject's last weights against the better average of the first method's run, on the same seeds."""
    measure, base = files.measures[0], files.label(files.base)
    last, averages = _by_seed(files, files.base, "last", measure), {}
    for name in _AVERAGES:
        if values := _by_seed(files, files.base, name, measure):
            averages[name] = values
    if not files.subjects or not averages or not last:
        return []
    sign = -1 if measure.lower_is_better else 1
    best = max(averages, key=lambda name: _rank(sign * float(np.mean(list(averages[name].values())))))
    gain = _difference(averages[best], last, measure)
    average = f"{base}'s own {READ_OUTS[best]}"
    first = (
        f"By averaging alone, {average} is at {gain} against its last weights. Against that average, the last weights "
        "of"
    )
    clauses = []
    for method in files.subjects:
        values = _by_seed(files, method, "last", measure)
        differences = _differences(values, averages[best])
        if not differences:
            clauses.append(f"{files.label(method)} have no run beside it")
            continue
        equal = len(differences) > 1 and np.ptp(differences) <= 1e-9 * np.abs(differences).max()
        low, high = t_interval(differences)
        low, high = (low, high) if sign > 0 else (-high, -low)
        what = (
            "one seed, so no test"
            if files.config["seeds"] == 1
            else "the same on every seed, so no test"
            if equal
            else "more than averaging gives"
            if low > 0
            else "less than averaging gives"
            if high < 0
            else "not shown to be more than averaging gives"
        )
        clauses.append(f"{files.label(method)} are at {_difference(values, averages[best], measure)}, {what}")
    return [f"{first} {'; those of '.join(clauses)}."]


def _rank(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _by_seed(files: Files, method: str, read_out: str, measure: Measure) -> dict[int, float]:
    rows = [row for row in files.results if row["method"] == method and row["read_out"] == read_out]
    return {row["seed"]: float(row[measure.column]) for row in rows if measure.column in row}


def _differences(values: dict[int, float], reference: dict[int, float]) -> list[float]:
    return [values[seed] - reference[seed] for seed in values if seed in reference]


def _difference(values: dict[int, float], reference: dict[int, float], measure: Measure) -> str:
    """The mean of paired differences with half of its 95 % interval, and its unit."""
    pairs = _differences(values, reference)
    low, high = t_interval(pairs)
    mean = float(np.mean(pairs)) if pairs else math.nan
    half = (high - low) / 2 if math.isfinite(high) else math.nan
    words = estimate(mean, half, measure.factor, measure.digits, "+")
    return words if words == "diverged" else f"{words}{measure.difference_unit}"
