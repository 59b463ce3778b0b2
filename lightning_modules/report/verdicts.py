"""What numbers say of a claim: confirmed, not confirmed or not resolved, and how that is put into words."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lightning_modules.support.paired import t_interval

Numbers = np.ndarray[tuple[int], np.dtype[np.float64]]  # (n,)

CONFIRMED, NOT_CONFIRMED, NOT_RESOLVED = "confirmed", "not confirmed", "not resolved"


def side(low: float, high: float) -> str:
    """What an interval says of a claim that something is above 0."""
    return CONFIRMED if low > 0 else NOT_CONFIRMED if high < 0 else NOT_RESOLVED


def spread(values: Sequence[float] | Numbers) -> str:
    """The mean of values, and half of its 95 % interval where there is one."""
    low, high = t_interval(list(values))
    mean = float(np.mean(values)) if len(values) else math.nan
    return f"{mean:.2g}" if math.isinf(low) else f"{mean:.2g} ± {(high - low) / 2:.2g}"


def interval_words(share: object) -> str:
    """The 95 % interval of a share in words; empty where there is none."""
    low, high = (100 * float(getattr(share, name, math.nan)) for name in ("low", "high"))
    return f" (95 % interval {low:.0f} to {high:.0f} %)" if share else ""


def correlation(x: Numbers, y: Numbers) -> float:
    """Spearman's: of ranks, since a floor far outside of its step may lie anywhere. NaN where one does not vary."""
    from scipy import stats

    both = np.isfinite(x) & np.isfinite(y)
    varies = both.sum() > 2 and np.ptp(x[both]) > 0 and np.ptp(y[both]) > 0
    return float(stats.spearmanr(x[both], y[both]).statistic) if varies else math.nan
