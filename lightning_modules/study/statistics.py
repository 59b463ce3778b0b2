"""What a study concludes from its results: intervals, paired tests, seeds that it would take, times to a target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special, stats

from lightning_modules.support.files import Rows
from lightning_modules.support.paired import Change, effect_on, mean_over_seeds, paired_change
from lightning_modules.support.score import COSTS, Measure, Score, failed_runs

_ROUNDING = 1e-6  # relative: Lightning's scores are float32
_LEVEL, _POWER = 0.05, 0.8
_MOST_SEEDS = 1000  # beyond them it does not matter how many
_NODES = 500


def summarise(
    rows: Sequence[Mapping[str, Any]], methods: Sequence[str], measures: Sequence[Measure], seeds: Sequence[int]
) -> Rows:
    """Means over seeds with 95 % t-intervals, and paired changes from the first method at the same read-out.

    Losses are compared on their logarithm: their means are geometric, and changes from the first method are ratios.
    Where a value of a measure is not above 0, changes of that measure are differences in the whole table. Runs that
    failed, as in :func:`lightning_modules.support.score.failed_runs`, are counted, and are in no mean and no pair.

    Args:
        rows: One for each method, seed and read-out; runs that died have none.
        methods: The methods; the others are compared with the first.
        measures: Columns of the rows.
        seeds: Those of the study.

    Returns:
        One row for each read-out, measure and method, but for read-outs that a method does not have: the kind of
        effect; mean with the ends of its interval, number of seeds in it and of failed ones; change from the first
        method with the ends of its interval, and number of pairs; and where there are two pairs p-value of the paired
        t-test, alone and corrected by Holm (1979) for the methods compared, and the number of seeds that would show a
        change of that size (:func:`seeds_to_show`).
    """
    failed = failed_runs(rows, methods, seeds)
    counted = [row for row in rows if row["seed"] not in failed[row["method"]]]
    effects = {m.column: effect_on([float(row[m.column]) for row in counted], m.effect) for m in measures}
    summary: Rows = []
    for read_out in dict.fromkeys(row["read_out"] for row in rows):
        for measure, effect in effects.items():
            values: dict[str, dict[int, float]] = {method: {} for method in methods}
            for row in counted:
                if row["read_out"] == read_out:
                    values[row["method"]][row["seed"]] = float(row[measure])
            changes = [paired_change(values[m] if m != methods[0] else {}, values[methods[0]], effect) for m in methods]
            p_values = [p_value(change) for change in changes]
            compared = sum(not math.isnan(p) for p in p_values)
            for method, change, p, p_holm in zip(methods, changes, p_values, holm(p_values), strict=True):
                if not values[method] and len(failed[method]) < len(seeds):
                    continue  # it has no such read-out
                mean = mean_over_seeds([*values[method].values()], effect)
                summary.append(
                    {
                        **{"read_out": read_out, "measure": measure, "method": method, "effect": effect},
                        **{"mean": mean.value, "low": mean.low, "high": mean.high},
                        **{"n": len(values[method]), "failed": len(failed[method])},
                        **{"change": change.mean.value, "change_low": change.mean.low, "change_high": change.mean.high},
                        **{"pairs": change.pairs, "p": p, "p_holm": p_holm},
                        "seeds_to_show": math.nan if math.isnan(p) else seeds_to_show(change, compared),
                    }
                )
    return summary


def p_value(change: Change) -> float:
    """Of the t-test that paired changes have mean 0; NaN where it is not defined, as for equal changes in all pairs."""
    if math.isnan(change.spread):
        return math.nan
    if change.equal:
        return math.nan if change.shift else 1.0
    t = abs(change.shift) / change.spread * math.sqrt(change.pairs)
    return float(2 * stats.t.sf(t, change.pairs - 1))


def seeds_to_show(change: Change, compared: int) -> float:
    """Pairs with which a paired t-test finds a change of this size and spread in four of five studies.

    The power of the two-sided test is exact, by the noncentral t-distribution. Its level is 5 % over the number of
    methods compared, the strictest of Holm's, so that more seeds are named than were not enough.

    Args:
        change: What was seen.
        compared: Number of methods that are tested beside each other.

    Returns:
        The number, at least 2; infinite above 1,000.
    """
    if change.equal:
        return math.inf if change.shift == 0 else 2.0
    size = abs(change.shift) / change.spread
    low, high = 1, _MOST_SEEDS  # the power grows with the number: not enough, and enough
    if _power(size, high, _LEVEL / compared) < _POWER:
        return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _power(size, middle, _LEVEL / compared) >= _POWER else (middle, high)
    return float(high)


def _power(size: float, pairs: int, level: float) -> float:
    """Of the two-sided test that a mean, in standard deviations, is 0: both tails of the noncentral t-distribution.

    Given the standard deviation of the sample, t is normal, so this averages over that; of SciPy's own function of the
    noncentral t-distribution, which is NaN for many large shifts, it keeps four digits.
    """
    critical, shift = stats.t.ppf(1 - level / 2, pairs - 1), size * math.sqrt(pairs)
    shares = (np.arange(_NODES) + 0.5) / _NODES
    free = (pairs - 1) / 2  # half the degrees of freedom
    deviations = np.sqrt(special.gammaincinv(free, shares) / free)  # (_NODES,), of which each is as likely
    tails = special.ndtr(shift - critical * deviations) + special.ndtr(-shift - critical * deviations)
    return float(np.mean(tails))


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
