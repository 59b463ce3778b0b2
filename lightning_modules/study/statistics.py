"""What a study concludes from its results: intervals, paired tests, times to a target, ranges of stable rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from lightning_modules.support.files import Rows
from lightning_modules.support.score import COSTS, Score

_ROUNDING = 1e-6  # relative: modules log in float32, so that one image more is not the same difference everywhere

Numbers = np.ndarray[Any, np.dtype[np.float64]]


def summarise(rows: Sequence[Mapping[str, Any]], methods: Sequence[str], measures: Sequence[str]) -> Rows:
    """Means over seeds with 95 % t-intervals, and paired differences to the first method at the same read-out.

    Args:
        rows: One for each method, seed and read-out; runs that died have none, and their seeds drop out of the pairs.
        methods: The methods; the others are compared with the first.
        measures: Columns of the rows.

    Returns:
        One row for each read-out, measure and method: mean, half-width of its interval, n, and difference to the
        first method with half-width, number of pairs and p-value of the paired t-test, alone and corrected by Holm
        (1979) for the methods compared, where there are two pairs.
    """
    summary: Rows = []
    for read_out in dict.fromkeys(row["read_out"] for row in rows):
        for measure in measures:
            values = {
                method: {
                    row["seed"]: float(row[measure])
                    for row in rows
                    if row["method"] == method and row["read_out"] == read_out
                }
                for method in methods
            }
            entries = [
                {
                    "read_out": read_out,
                    "measure": measure,
                    "method": m,
                    **_estimate(values[m], values[methods[0]], m == methods[0]),
                }
                for m in methods
                if values[m]
            ]
            for entry, p in zip(entries, holm([entry["p"] for entry in entries]), strict=True):
                summary.append({**entry, "p_holm": p})
    return summary


def _estimate(own: Mapping[int, float], base: Mapping[int, float], is_base: bool) -> dict[str, float]:
    mean, half = interval(np.array(list(own.values())))
    entry = {"mean": mean, "half_width": half, "n": len(own)}
    shared = [] if is_base else [seed for seed in own if seed in base]
    if not shared:
        return {**entry, "difference": math.nan, "difference_half_width": math.nan, "pairs": 0, "p": math.nan}
    paired = np.array([own[seed] - base[seed] for seed in shared])
    difference, half = interval(paired)
    p = p_value(paired, rounding=_ROUNDING * max(abs(value) for seed in shared for value in (own[seed], base[seed])))
    found = {"difference": difference, "difference_half_width": half, "pairs": len(shared), "p": p}
    return {**entry, **found}


def interval(values: Numbers) -> tuple[float, float]:
    """Mean and half-width of its 95 % t-interval; NaN for fewer than two values, or where one is not finite."""
    n = len(values)
    if n < 2 or not np.isfinite(values).all():
        return float(values.mean()), math.nan
    return float(values.mean()), float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))


def p_value(differences: Numbers, *, rounding: float = 0.0) -> float:
    """Of the t-test that paired differences have mean 0; NaN where it is not defined.

    Args:
        differences: One for each pair.
        rounding: A spread that is no more than that of rounded values, of which the t-statistic would make a lot.
    """
    if len(differences) < 2 or not np.isfinite(differences).all():
        return math.nan
    if np.ptp(differences) <= max(rounding, 1e-9 * np.abs(differences).max()):
        return 1.0 if abs(differences[0]) <= rounding else math.nan
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method (1979, section 3); NaN stays and counts not."""
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[i] = largest
    return corrected


def times_to_target(
    metrics: Mapping[str, Mapping[int, Rows]], seeds: Sequence[int], target: float, score: Score
) -> Rows:
    """What each run had cost at the first validation that reached a target.

    Args:
        metrics: Method to seed to the steps of its run; a run that died is not there.
        seeds: Seeds of the study.
        target: Value of the score in validation.
        score: What is aimed at.

    Returns:
        One row for each method and seed: whether it was reached, and steps, gradients and seconds, infinite where not.
    """
    rows: Rows = []
    for method, runs in metrics.items():
        for seed in seeds:
            validated = [row for row in runs.get(seed, []) if score.monitor in row]
            # Lightning's scores are float32, which may lie just below the share of images that they stand for.
            least = score.sign * target - _ROUNDING * abs(target)
            reached = next((row for row in validated if score.sign * row[score.monitor] >= least), None)
            costs = {name: math.inf if reached is None else float(reached[name]) for name in COSTS}
            rows.append({"method": method, "seed": seed, "reached": int(reached is not None), **costs})
    return rows
