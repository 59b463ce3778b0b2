"""How often a method refreshes its directions in a study: measured once, before its runs, and written down.

In a run by itself ``refresh_every="auto"`` goes by the clock, so that no two runs are alike. A study settles the number
in a short training that nothing else is taken from, and gives it to every run of the method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median

import yaml

from lightning_modules.study.methods import Method, NSGDOptions, damping_of
from lightning_modules.study.options import Study
from lightning_modules.support.files import Rows, write_yaml_once
from nsgd.directions.pace import interval_of
from nsgd.options import FROM_TRAINING

_FOLDER = "rehearsals"
_EVERY, STEPS = 3, 16  # steps between two refreshes, and in all: six refreshes, of which the first is not timed

Train = Callable[[Method, NSGDOptions, int], Rows]  # steps of a method with these options: what each took


def settled_options(study: Study, out: Path, method: Method, train: Train) -> NSGDOptions:
    """The options of NSGD that the runs of a method take: the study's own, with a number where the clock would decide.

    The number is what the folder holds; where it holds none, it is measured and kept as ``rehearsals/METHOD.yaml``.
    Runs that start at the same time, in several processes, take the number of the first that wrote one.

    Args:
        study: The study.
        out: Its folder.
        method: One of its methods.
        train: Trains a method for some steps, and returns their rows, with ``seconds`` and ``refreshes`` so far.
    """
    own = damping_of(method, study.given(method), study.nsgd)
    if own is None or own.solver in FROM_TRAINING or own.solver == "random" or own.refresh_every != "auto":
        return study.nsgd
    path = out / _FOLDER / f"{method}.yaml"
    if not path.exists():
        rows = train(method, replace(study.nsgd, refresh_every=_EVERY, warmup_steps=0), STEPS)
        write_yaml_once(path, {"refresh_every": interval_of(*prices(rows), own.overhead)})
    every: int = yaml.safe_load(path.read_text())["refresh_every"]
    return replace(study.nsgd, refresh_every=every)


def prices(rows: Rows) -> tuple[float, float]:
    """Seconds of a refresh, and of a step without one, as medians of a rehearsal's steps but the first."""
    refreshing: list[float] = []
    plain: list[float] = []
    for before, row in pairwise(rows):
        took = row["seconds"] - before["seconds"]
        (refreshing if row["refreshes"] > before["refreshes"] else plain).append(took)
    step = median(plain)
    # Where every refresh met a NaN, none is timed.
    return (max(0.0, median(refreshing) - step) if refreshing else 0.0), step
