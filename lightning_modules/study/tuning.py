"""What the runs of a study train with: quasi-random trials, the settings they lead to, and the rates of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import qmc

from lightning_modules.study.methods import Method, Settings
from lightning_modules.study.options import Study
from lightning_modules.support.files import Rows

TUNING_SEED, REPEAT_SEEDS = 1000, (1001, 1002)  # never used by the study itself
_FINALISTS = 3  # trials of a method that run again: one seed alone picks rates that diverge on others


def trial_settings(study: Study, method: Method) -> list[Settings]:
    """The hyperparameters of every trial: a scrambled Halton sequence over the logarithms of the ranges."""
    ranges = study.ranges(method)
    low, high = (np.log10([ends[i] for ends in ranges.values()]) for i in (0, 1))
    points = qmc.Halton(len(ranges), rng=0).random(study.tune)
    values = 10 ** (low + points * (high - low))
    return [
        {**study.given(method), **dict(zip(ranges, (float(f"{v:.4g}") for v in row), strict=True))} for row in values
    ]


def sweep_rates(study: Study, method: Method) -> list[float]:
    """Learning rates of the sweep, evenly spaced in their logarithm over the method's range."""
    low, high = study.ranges(method).get("lr") or study.recipes[method].rates
    return [float(f"{lr:.4g}") for lr in np.geomspace(low, high, study.sweep_points)]


def repeats(study: Study) -> list[tuple[int, int]]:
    """Rank of a trial, from 0 for the best, and seed of every repeat of a method; none where there is no choice."""
    finalists = min(_FINALISTS, study.tune) if study.tune > 1 else 0
    return [(rank, seed) for rank in range(finalists) for seed in REPEAT_SEEDS]


def trial_row(
    study: Study, method: Method, trial: int, seed: int, tried: Mapping[str, Any], scores: Mapping[str, Any]
) -> dict[str, Any]:
    """One run of a trial: what was searched, and what it scored in validation and training.

    Args:
        study: The study.
        method: Whose trial it is.
        trial: Its number.
        seed: Of the run.
        tried: What the run trained with.
        scores: Its results.
    """
    searched = {name: tried[name] for name in study.ranges(method)}
    wanted = dict.fromkeys((study.score.criterion(scores).column, study.score.monitor, "train_loss"))
    about = {"method": method, "trial": trial, "seed": seed}
    return {**about, **searched, **{name: scores[name] for name in wanted}}


def best_trials(study: Study, method: Method, trials: Rows) -> list[int]:
    """The trials of a method that run again, three at most, the best with the first seed first.

    Args:
        study: The study.
        method: One that is tuned.
        trials: Rows of all finished trials.

    Raises:
        ValueError: If all trials of the method died, or diverged.
    """
    rows = [row for row in trials if row["method"] == method and row["seed"] == TUNING_SEED]
    if not rows:
        raise ValueError(f"every trial of {method} died; see tuning/{method}-0/failed.txt in its folder")
    criterion = study.score.criterion(rows[0])
    best = sorted(rows, key=criterion.badness)[:_FINALISTS]
    if math.isinf(criterion.badness(best[0])):
        raise ValueError(f"every trial of {method} diverged; give search.{method} a range of smaller rates")
    return [row["trial"] for row in best]


def chosen_settings(
    study: Study, trials: Rows, finalists: Mapping[Method, Sequence[int]]
) -> tuple[dict[Method, Settings], float | None]:
    """Settings of every method, and the target: as given, or by the chosen trial of each method, and of the first.

    Of the trials that ran again, the one is chosen that diverged, or died, with the fewest seeds; among these, the one
    with the best mean over the others. Methods without ranges, such as the module's own optimizer, are not tuned.

    Args:
        study: The study.
        trials: Rows of all finished trials and of their repeats; none where nothing is tuned.
        finalists: Trials to choose from, of each method that is tuned, as :func:`best_trials` gives them.
    """
    settings = {method: study.given(method) for method in study.recipes}
    target = study.target
    for method, recipe in study.recipes.items():
        own = recipe.tuned_as(method)
        if own not in finalists:
            continue
        trial, rows = _chosen(study, [row for row in trials if row["method"] == own], finalists[own])
        settings[method] = trial_settings(study, own)[trial]
        if own == next(iter(study.recipes)) and target is None:
            target = fmean(float(row[study.score.monitor]) for row in rows)
    return settings, target


def _chosen(study: Study, rows: Rows, finalists: Sequence[int]) -> tuple[int, Rows]:
    """The trial that is chosen, and its rows that did not diverge."""
    badness = study.score.criterion(rows[0]).badness
    held = {n: [row for row in rows if row["trial"] == n and math.isfinite(badness(row))] for n in finalists}

    def worse(trial: int) -> tuple[int, float]:
        kept = held[trial]
        return -len(kept), fmean(map(badness, kept)) if kept else math.inf

    best = min(finalists, key=worse)
    return best, held[best]
