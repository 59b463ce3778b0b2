"""What the runs of a study train with: quasi-random trials, the settings they lead to, and the rates of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import qmc

from lightning_modules.study.methods import Method, Settings
from lightning_modules.study.options import Study
from lightning_modules.support.files import Rows


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


def trial_row(study: Study, method: Method, trial: int, scores: Mapping[str, Any]) -> dict[str, Any]:
    """One trial: what was searched, and what it scored in validation and training."""
    settings = trial_settings(study, method)[trial]
    searched = {name: settings[name] for name in study.ranges(method)}
    wanted = dict.fromkeys((study.score.criterion(scores).column, study.score.monitor, "train_loss"))
    return {"method": method, "trial": trial, **searched, **{name: scores[name] for name in wanted}}


def chosen_settings(study: Study, trials: Rows) -> tuple[dict[Method, Settings], float | None]:
    """Settings of every method, and the target: as given, or by the best trial of each method, and of the first.

    Methods without ranges, such as the module's own optimizer, are not tuned.

    Args:
        study: The study.
        trials: Rows of all finished trials; none where nothing is tuned.

    Raises:
        ValueError: If all trials of a method died.
    """
    settings = {method: study.given(method) for method in study.recipes}
    target = study.target
    if study.tune:
        for method in (m for m in study.recipes if study.ranges(m)):
            own = study.recipes[method].tuned_as(method)
            rows = [row for row in trials if row["method"] == own]
            if not rows:
                raise ValueError(f"every trial of {own} died; see tuning/{own}-0/failed.txt in its folder")
            criterion = study.score.criterion(rows[0])
            best = min(rows, key=criterion.badness)
            if math.isinf(criterion.badness(best)):
                raise ValueError(f"every trial of {own} diverged; give search.{own} a range of smaller rates")
            settings[method] = trial_settings(study, own)[best["trial"]]
            if own == next(iter(study.recipes)) and target is None:
                target = float(best[study.score.monitor])
    return settings, target
