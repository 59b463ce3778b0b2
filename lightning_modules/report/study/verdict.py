"""What a study says in one line, and whether a gain is more than averaging gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_modules.report.study.files import Files
from lightning_modules.report.study.numbers import (
    aim,
    and_,
    change_in_words,
    change_of,
    mean_of,
    over_pairs,
    seeds_of,
    standing,
    to_show,
    upper,
)
from lightning_modules.support.paired import mean_over_seeds, paired_change
from lightning_modules.support.read_outs import label_of
from lightning_modules.support.score import Measure

_AVERAGES = ("ema", "swa")
_EQUAL = 0.005  # of a cost: less is "as many"


def verdict(files: Files) -> str:
    """Lines: the endpoint, which a study is judged by; how many seeds it would take; what is beside it; the cost."""
    if len(files.methods) == 1:
        return f"{files.label(files.base)} was trained alone: there is nothing to compare it with."
    sentences = [judgement(files), _to_show(files), _beside(files), _cost(files)]
    return "\n".join(sentence for sentence in sentences if sentence)


def _labels(files: Files, methods: Sequence[str]) -> str:
    return and_([files.label(method) for method in methods])


def _entries(files: Files, measure: Measure) -> dict[str, dict[str, Any]]:
    """Of the last weights, by method; none of a method all of whose runs failed."""
    return {e["method"]: e for e in files.entries(measure.column) if e["read_out"] == "last" and e["n"]}


def _value(entry: dict[str, Any], measure: Measure, *facts: str) -> str:
    """The mean with its unit, and in brackets what else there is to say of it: failed seeds always."""
    value = mean_of(entry, measure, interval=False)
    inside = "; ".join(filter(None, [seeds_of(entry), *facts]))
    return f"{value if value == 'diverged' else f'{value}{measure.unit}'}{f' ({inside})' if inside else ''}"


def judgement(files: Files) -> str:
    """The endpoint: each subject against the first method, those of one kind together."""
    measure, base = files.endpoint, files.base
    entries = _entries(files, measure)
    kinds: dict[str, list[str]] = {}
    for method in files.subjects:
        kind = standing(entries[method], measure) if method in entries else "failed"
        kinds.setdefault(kind, []).append(method)
    if base not in entries:
        return f"Every run of {files.label(base)} failed, so there is nothing to compare with."
    reference = f"{files.label(base)} {_value(entries[base], measure)}"
    clauses, untested = [], "one seed allows no test" if files.config["seeds"] == 1 else "no test is possible"
    for kind, methods in kinds.items():
        if kind == "failed":
            clauses.append(f"every run of {_labels(files, methods)} failed")
            continue
        values = []
        for method in methods:
            change = change_of(entries[method], measure, words=True)
            facts = [change, f"p = {entries[method]['p_holm']:.2g}"] if kind in ("better", "worse") else []
            values.append(f"{files.label(method)} {_value(entries[method], measure, *facts)}")
        words = {"n.s.": "no significant difference in", "no test": f"{untested} of"}
        what = f"{words.get(kind, f'significantly {kind} in')} {measure.label}"
        clauses.append(f"{what}: {and_(values)} against {reference}")
    return f"{upper('; '.join(clauses))}."


def _to_show(files: Files) -> str:
    """How many seeds would show the differences that are not significant."""
    entries = _entries(files, files.endpoint)
    unclear = [m for m in files.subjects if m in entries and standing(entries[m], files.endpoint) == "n.s."]
    known = [method for method in unclear if not math.isnan(entries[method]["seeds_to_show"])]
    if not known:
        return ""
    if len(known) == 1:
        return f"A difference of this size would take {to_show(entries[known[0]])} seeds to show."
    seeds = and_([f"{to_show(entries[method])} ({files.label(method)})" for method in known])
    return f"Differences of these sizes would take {seeds} seeds to show."


def _beside(files: Files) -> str:
    """What stands beside the endpoint, where that differs significantly: the subjects first, then all others."""
    measure = files.secondary
    if measure is None:
        return ""
    entries = _entries(files, measure)
    compared = [*files.subjects, *(m for m in files.methods[1:] if m not in files.subjects)]
    kinds: dict[str, list[str]] = {}
    for method in (m for m in compared if m in entries):
        kinds.setdefault(standing(entries[method], measure), []).append(method)
    clauses = []
    for kind in (kind for kind in kinds if kind in ("better", "worse")):
        values = [
            f"{files.label(m)} {_value(entries[m], measure, change_of(entries[m], measure, words=True))}"
            for m in kinds[kind]
        ]
        clauses.append(f"{kind} with {and_(values)}")
    if not clauses:
        return ""
    reference = f"{files.label(files.base)} {_value(entries[files.base], measure)}"
    return f"Secondary, {measure.label} against {reference}: significantly {'; '.join(clauses)}."


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
        steps, seconds = (
            _compared(median[name], base_median[name], noun)
            for name, noun in (("step", "steps"), ("seconds", "seconds"))
        )
        doubt = "" if "as many" in seconds or files.seconds_differ(method) else ", not clearly,"
        clauses.append(f"{label} needed {steps} and{doubt} {seconds}")
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
    measure, base = files.endpoint, files.label(files.base)
    last, averages = files.values(files.base, "last", measure), {}
    for name in _AVERAGES:
        if values := files.values(files.base, name, measure):
            averages[name] = values
    if not files.subjects or not averages or not last:
        return []
    effect = files.effect(measure)
    sign = -1 if measure.lower_is_better else 1
    best = max(averages, key=lambda name: _rank(sign * mean_over_seeds([*averages[name].values()], effect).value))

    def against(values: Mapping[int, float], reference: Mapping[int, float]) -> str:
        change = paired_change(values, reference, effect)
        return change_in_words(change.mean, effect, measure, words=True) + over_pairs(change.pairs, len(values))

    average = f"{base}'s own {label_of(best)}"
    first = (
        f"By averaging alone, {average} is at {against(averages[best], last)} against its last weights. Against that "
        "average, the last weights of"
    )
    clauses = []
    for method in files.subjects:
        values = files.values(method, "last", measure)
        change = paired_change(values, averages[best], effect)
        if not change.pairs:
            clauses.append(f"{files.label(method)} have no run beside it")
            continue
        none = 1 if effect == "ratio" else 0
        low, high = (sign * (end - none) for end in (change.mean.low, change.mean.high)[::sign])
        what = (
            "one seed, so no test"
            if files.config["seeds"] == 1
            else "the same on every seed, so no test"
            if change.equal
            else "more than averaging gives"
            if low > 0
            else "less than averaging gives"
            if high < 0
            else "not shown to be more than averaging gives"
        )
        failed = len(files.failed[method])
        lost = f" ({len(values)} of {files.config['seeds']} seeds; {failed} failed)" if failed else ""
        clauses.append(f"{files.label(method)}{lost} are at {against(values, averages[best])}, {what}")
    return [f"{first} {'; those of '.join(clauses)}."]


def _rank(value: float) -> float:
    return value if math.isfinite(value) else -math.inf
