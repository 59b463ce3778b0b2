"""Means with 95 % intervals, and the mean change over pairs of runs: a difference, or for losses a ratio."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Effect = Literal["difference", "ratio"]

_Numbers = np.ndarray[tuple[int], np.dtype[np.float64]]  # (n,)

_ROUNDING = 1e-6  # relative: modules log in float32, so that one image more is not the same difference everywhere


@dataclass(frozen=True)
class Mean:
    """A mean, geometric where effects are ratios, with the ends of its 95 % interval.

    Attributes:
        value: The mean; NaN of no values.
        low: Lower end, without a bound where there is no interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Change:
    """The mean change over pairs.

    Attributes:
        mean: Of the differences, or of the ratios, with its interval.
        pairs: How many.
        shift: Mean of the differences, or of the logarithms of the ratios; exactly 0 where rounding explains all.
        spread: Their standard deviation; NaN of fewer than two, or where one is not finite.
        equal: Whether they are the same for every pair, up to rounding, so that a t-test has no spread to go by.
    """

    mean: Mean
    pairs: int
    shift: float
    spread: float
    equal: bool


def t_interval(values: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Interval of the mean, of 95 %; without bounds for fewer than two values, or where one is not finite."""
    if len(values) < 2 or not np.isfinite(values).all():
        return -math.inf, math.inf
    from scipy import stats  # takes a second

    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def effect_on(values: Collection[float], wanted: Effect) -> Effect:
    """The effect that all values of a table allow: one that is not above 0 has no ratio."""
    return "difference" if any(value <= 0 for value in values) else wanted


def mean_over_seeds(values: Sequence[float], effect: Effect) -> Mean:
    """The mean of values, all of them above 0 where it is geometric."""
    return _mean(_scaled(values, effect), effect)


def paired_change(values: Mapping[int, float], reference: Mapping[int, float], effect: Effect) -> Change:
    """The mean change from a reference, over the seeds that both have."""
    seeds = [seed for seed in values if seed in reference]
    own, base = ([of[seed] for seed in seeds] for of in (values, reference))
    with np.errstate(invalid="ignore"):  # of what diverged
        steps = _scaled(own, effect) - _scaled(base, effect)
    if not seeds or not np.isfinite(steps).all():
        return Change(_mean(np.full(1, math.nan), effect), len(seeds), math.nan, math.nan, equal=False)
    rounding = _ROUNDING * (1.0 if effect == "ratio" else max(map(abs, (*own, *base))))
    # A spread no larger than that of rounded values, of which a t-statistic would make a lot.
    equal = len(seeds) > 1 and bool(np.ptp(steps) <= max(rounding, 1e-9 * np.abs(steps).max()))
    shift = float(np.mean(steps))
    return Change(
        _mean(steps, effect),
        len(seeds),
        0.0 if equal and abs(shift) <= rounding else shift,
        float(np.std(steps, ddof=1)) if len(seeds) > 1 else math.nan,
        equal,
    )


def _mean(scaled: _Numbers, effect: Effect) -> Mean:
    middle = float(np.mean(scaled)) if len(scaled) else math.nan
    value, low, high = (_back(end, effect) for end in (middle, *t_interval(list(scaled))))
    return Mean(value, low, high)


def _scaled(values: Sequence[float], effect: Effect) -> _Numbers:
    plain = np.array(values, dtype=np.float64)
    return np.log(plain) if effect == "ratio" else plain


def _back(value: float, effect: Effect) -> float:
    """From the scale that means are taken on to that of the values."""
    with np.errstate(over="ignore"):  # an end that no number holds is no bound
        return float(np.exp(value)) if effect == "ratio" else value
