"""Numbers of a study as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_modules.report.study.files import Files
from lightning_modules.support.paired import Effect, Mean
from lightning_modules.support.score import Measure

SIGNIFICANT = 0.05
MISSING = "–"


def estimate(value: float, half: float, factor: float, digits: int, sign: str = "") -> str:
    """A value with the half-width of its interval, where it has one; "diverged" where it is not finite."""
    if not math.isfinite(value):
        return "diverged"
    size = abs(value * factor)
    small = digits > 1 and 1e-9 <= size < 5 * 10.0**-digits  # a few digits would say 0
    kind = ".2e" if small or size >= 1e4 else f".{digits}f"
    text = f"{value * factor:{sign}{kind}}"
    return text if math.isnan(half) else f"{text} ± {half * factor:{kind}}"


def mean_of(entry: Mapping[str, Any], measure: Measure, *, interval: bool = True) -> str:
    """The mean of a row of the summary, without unit, with its interval where there is and should be one."""
    if not entry["n"]:
        return "failed"
    low, high = (entry["low"], entry["high"]) if interval else (-math.inf, math.inf)
    value = estimate(entry["mean"], math.nan, measure.factor, measure.digits)
    if value == "diverged" or not math.isfinite(high):
        return value
    if entry["effect"] == "difference":
        return estimate(entry["mean"], (high - low) / 2, measure.factor, measure.digits)
    ends = (estimate(end, math.nan, measure.factor, measure.digits) for end in (low, high))
    return f"{value} ({' to '.join(ends)})"


def change_of(entry: Mapping[str, Any], measure: Measure, *, words: bool = False) -> str:
    """Its change from the first method; empty where no seed has both.

    Args:
        entry: Of the summary.
        measure: Its measure.
        words: Whether it is part of a sentence, with its unit.
    """
    if not entry["pairs"]:
        return ""
    change = Mean(entry["change"], entry["change_low"], entry["change_high"])
    fewer = over_pairs(entry["pairs"], entry["n"])
    return change_in_words(change, entry["effect"], measure, words=words) + fewer


def over_pairs(pairs: int, seeds: int) -> str:
    """That a change rests on fewer seeds than the mean beside it, where the other method failed with some."""
    return f" over {count(pairs, 'pair')}" if pairs < seeds else ""


def change_in_words(change: Mean, effect: Effect, measure: Measure, *, words: bool) -> str:
    """A difference as "+2.0 ± 2.5", a ratio as "0.31 times (0.26 to 0.37)"."""
    if not math.isfinite(change.value):
        return "diverged"
    if effect == "difference":
        half = (change.high - change.low) / 2 if math.isfinite(change.high) else math.nan
        text = estimate(change.value, half, measure.factor, measure.digits, "+")
        return f"{text}{measure.difference_unit}" if words else text
    text = f"{ratio(change.value)} times"
    if not math.isfinite(change.high):
        return text
    ends = f"{ratio(change.low)} to {ratio(change.high)}"
    return f"{text}, 95 % {ends}" if words else f"{text} ({ends})"


def ratio(value: float) -> str:
    """With two digits at least: 0.036, 0.98, 28."""
    if 0.1 <= value < 10:
        return f"{value:.2f}"
    return f"{value:,.0f}" if 10 <= value < 1e4 else f"{value:.2g}"


def seeds_of(entry: Mapping[str, Any]) -> str:
    """How many seeds a mean is of, where some failed; stands wherever the mean does."""
    n, failed = entry["n"], entry["failed"]
    if not failed:
        return ""
    return f"{n} of {n + failed} seeds; {failed} failed" if n else f"all {count(failed, 'seed')}"


def to_show(entry: Mapping[str, Any]) -> str:
    """How many seeds a change of this size would take to show."""
    seeds = entry["seeds_to_show"]
    if math.isnan(seeds):
        return MISSING
    return f"about {seeds:.0f}" if math.isfinite(seeds) else "over 1,000"


def test_of(entry: Mapping[str, Any]) -> str:
    """What the test says of the change."""
    p = entry["p_holm"]
    if math.isnan(p):
        return "no test"  # one pair, or the same change for every seed
    return f"{'significant' if p < SIGNIFICANT else 'no significant difference'} (p = {p:.2g})"


def standing(entry: Mapping[str, Any], measure: Measure) -> str:
    """A method against the first one, shortly: better or worse where that is significant, else n.s., or no test."""
    if math.isnan(entry["p_holm"]):
        return "no test"
    if entry["p_holm"] >= SIGNIFICANT:
        return "n.s."
    none = 1 if entry["effect"] == "ratio" else 0
    return "better" if (entry["change"] < none) == measure.lower_is_better else "worse"


def amount(value: float) -> str:
    """A cost."""
    if math.isinf(value):
        return "not reached"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def aim(files: Files, target: float) -> str:
    """What was aimed at, such as "90 % validation accuracy"."""
    measure = files.score.validation
    return f"{aimed(files, target)} {measure.label}" if measure.unit else f"a {measure.label} of {aimed(files, target)}"


def aimed(files: Files, target: float) -> str:
    """Its value alone, such as "90 %"."""
    measure = files.score.validation
    return f"{measure.factor * target:.4g}{measure.unit}"


def settings_of(settings: Mapping[str, float]) -> str:
    """Hyperparameters as they were used."""
    return ", ".join(f"{name} {round(v) if name == 'k' else v:g}" for name, v in settings.items())


def upper(words: str) -> str:
    """With a capital at the beginning."""
    return words[0].upper() + words[1:]


def count(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def and_(parts: Sequence[str]) -> str:
    """A list in words."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)
