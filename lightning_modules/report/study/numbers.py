"""Numbers of a study as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_modules.report.study.files import Files
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


def mean_of(entry: Mapping[str, Any], measure: Measure) -> str:
    """The mean of a row of the summary, without unit."""
    return estimate(entry["mean"], entry["half_width"], measure.factor, measure.digits)


def difference_of(entry: Mapping[str, Any], measure: Measure) -> str:
    """Its difference to the first method, without unit; empty where no seed has both."""
    if not entry["pairs"]:
        return ""
    return estimate(entry["difference"], entry["difference_half_width"], measure.factor, measure.digits, "+")


def test_of(entry: Mapping[str, Any]) -> str:
    """What the test says of the difference."""
    p = entry["p_holm"]
    if math.isnan(p):
        return "no test"  # one pair, a run that diverged, or the same difference for every seed
    return f"{'significant' if p < SIGNIFICANT else 'no significant difference'} (p = {p:.2g})"


def standing(entry: Mapping[str, Any], measure: Measure) -> str:
    """A method against the first one, shortly: better or worse where that is significant, else n.s., or no test."""
    if math.isnan(entry["p_holm"]):
        return "no test"
    if entry["p_holm"] >= SIGNIFICANT:
        return "n.s."
    return "better" if (entry["difference"] < 0) == measure.lower_is_better else "worse"


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
