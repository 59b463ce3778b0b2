"""What walkers that escape say of the predictions, in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from lightning_modules.report.escape.files import FEWEST, Files, inverse, prediction

TOLERANCE = 0.1  # of a prediction
_ONE = "there is one batch size alone, and how a number changes with it takes two"
FIT_FROM = 4.0  # temperatures in the barrier: below, the prefactor's own dependence on the temperature bends the line


def findings(files: Files) -> tuple[str, str, str, str]:
    """One sentence each on escape times, damped escapes, the flat minimum's share and the price."""
    return _times(files), _damped(files), _share(files), _loss(files)


def overall(files: Files) -> str:
    """Say what is confirmed, what is not, and what these runs leave open, in one line."""
    kinds: dict[str, list[str]] = {"confirmed": [], "not confirmed": [], "not resolved": []}
    for finding in findings(files):
        subject, _, word = finding.partition(": ")[0].rpartition(", ")
        kinds[word].append(subject if subject.startswith("NSGD") else subject[0].lower() + subject[1:])
    return " ".join(f"{word.capitalize()}: {', '.join(subjects)}." for word, subjects in kinds.items() if subjects)


def verdict(checks: Iterable[tuple[float, float, float]]) -> str:
    """Verdict of measurements on predictions: confirmed, not confirmed or not resolved.

    Args:
        checks: Measured, its standard error, and predicted, each.
    """
    beyond = [
        (abs(measured - predicted) - TOLERANCE * abs(predicted), 2 * error) for measured, error, predicted in checks
    ]
    if any(distance > margin for distance, margin in beyond):
        return "not confirmed"
    return "confirmed" if beyond and all(distance <= -margin for distance, margin in beyond) else "not resolved"


def _slope(x: list[float], y: list[float], errors: list[float], groups: list[float]) -> tuple[float, float]:
    """Of parallel straight lines, one for each group, through points that count alike, and its standard error."""
    # Weights would favour the hottest points, which have the most arrivals and for which the line holds least.
    means = {group: np.mean([at for at, own in zip(x, groups, strict=True) if own == group]) for group in set(groups)}
    centred = np.array([at - means[group] for at, group in zip(x, groups, strict=True)])
    weights = centred / (centred**2).sum()
    return float(weights @ np.array(y)), float(np.sqrt((weights**2) @ np.array(errors) ** 2))


def _range(values: Iterable[float], kind: str) -> str:
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return "unknown"
    low, high = f"{min(known):{kind}}", f"{max(known):{kind}}"
    return low if low == high else f"{low} to {high}"


def _known(value: float) -> str:
    return number(value) if math.isfinite(value) else "unknown"


def _times(files: Files) -> str:
    rows = files.of("escape")
    barrier = files.barrier
    predicted = 2 * (1 - files.momentum) * barrier / files.config["noise"]
    fitted = [row for row in rows if barrier / row["temperature"] >= FIT_FROM * (1 - 1e-9) and row["arrived"] >= FEWEST]
    missing, walkers = sum(row["censored"] for row in rows), sum(row["walkers"] for row in rows)
    steps = files.config["steps"]
    counts = f"{missing:,} of {walkers:,} walkers had not arrived after {steps:,} steps and count by the later rate."
    x, rates = [inverse(row) for row in fitted], [row["lr"] for row in fitted]
    if len({(rate, round(value, 6)) for rate, value in zip(rates, x, strict=True)}) < 1 + len(set(rates)):
        return (
            f"Escape times, not resolved: fewer than two values of B/η at one rate have a barrier of {FIT_FROM:g} "
            f"temperatures and {FEWEST} arrivals; {counts}"
        )
    times = [files.time(row) for row in fitted]
    slope, error = _slope(x, [math.log(t) for t in times], [r["standard_error"] / r["measured"] for r in fitted], rates)
    exact = [files.time(row, "exact") for row in fitted]
    quadrature, off = "", [abs(row["measured"] / row["exact"] - 1) for row in fitted]
    if not any(math.isnan(t) for t in exact):
        bent, _ = _slope(x, [math.log(t) for t in exact], [0.0] * len(x), rates)
        quadrature = f" (the quadrature's: {bent / predicted:.3f}; the times are within {max(off):.1%} of it)"
    return (
        f"Escape times, {verdict([(slope, error, predicted)])}: with barriers of {FIT_FROM:g} temperatures or more the "
        f"slope of log time against B/η is {slope / predicted:.3f} ± {2 * error / predicted:.3f} times "
        f"{files.slope}{quadrature}; {counts}"
    )


def _damped(files: Files) -> str:
    rows = files.of("damped escape")
    checks = [(r["measured"], r["standard_error"], r["exact"]) for r in rows if not math.isnan(r["exact"])]
    tested = any(row["gamma"] != 1 and not math.isnan(row["exact"]) for row in rows)
    clauses = []
    for name, curvature in files.landscape["damped"].items():
        of = {row["gamma"]: row for row in rows if row["damped"] == name}
        low, base = min(of), 1.0 if 1.0 in of else max(of)
        place = {"way out": "way out", "sharpest": "sharpest direction"}[name]
        if name == "sharpest" and files.config["potential"] == "double-well":
            place += " of a channel along the same well"
        where = f"along the {place} (curvature {curvature:.3g})"
        measured, predicted = (of[low][c] / of[base][c] for c in ("measured", "exact"))
        took = f"{_known(measured)} times the steps of γ = {base:g}"
        if low == base:
            measured, predicted = of[low]["measured"], of[low]["exact"]
            took = f"{_known(measured)} steps"
        expectation = "no formula predicts it" if math.isnan(predicted) else f"predicted {_known(predicted)}"
        clauses.append(f"{where} escape takes {took}, {expectation}")
    gamma = min(row["gamma"] for row in rows)
    return f"NSGD, {verdict(checks) if tested else 'not resolved'}: with γ = {gamma:g} {'; '.join(clauses)}."


def _share(files: Files) -> str:
    rows = sorted(files.of("share", origin="both"), key=lambda row: row["batch_size"])
    if len(rows) < 2:
        return f"Flat minimum, not resolved: {_ONE}."
    word = verdict((row["measured"], row["standard_error"], prediction(row)) for row in rows)
    majority = sum(row["measured"] - 2 * row["standard_error"] > 0.5 for row in rows)
    largest = rows[-1]["batch_size"]
    sharp, flat = (files.of("share", origin=origin, batch_size=largest)[0]["measured"] for origin in ("sharp", "flat"))
    memory = (
        f"; at the largest, walkers remember after {rows[-1]['steps']:,} steps where they began: {sharp:.0%} of those "
        f"from the sharp minimum and {flat:.0%} of those from the flat one are there"
        if flat - sharp > 0.05
        else ""
    )
    return (
        f"Flat minimum, {word}: at batch sizes {_range((row['batch_size'] for row in rows), 'g')} its share of the "
        f"time, extrapolated from both minima, is {_range((row['measured'] for row in rows), '.1%')}, predicted "
        f"{_range(map(prediction, rows), '.1%')}, and surely above half at {majority} of {len(rows)}{memory}."
    )


def _loss(files: Files) -> str:
    rows = sorted(files.of("loss"), key=inverse, reverse=True)
    if len(rows) < 2:
        return f"Price of a large η/B, not resolved: {_ONE}."
    word = verdict((row["measured"], row["standard_error"], prediction(row)) for row in rows)
    first, last = rows[0], rows[-1]
    moves = "rises" if last["measured"] > first["measured"] else "does not rise"
    return (
        f"Price of a large η/B, {word}: the mean loss above the minimum {moves} from {_known(first['measured'])} at "
        f"η/B = {1 / inverse(first):.2g} to {_known(last['measured'])} at {1 / inverse(last):.2g}, predicted "
        f"{_known(prediction(first))} and {_known(prediction(last))}."
    )


def number(value: float) -> str:
    """Three digits, or all of a large number; empty where there is none."""
    return "" if math.isnan(value) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
