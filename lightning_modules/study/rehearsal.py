"""How often a method refreshes its directions in a study: measured once, before its runs, and written down.

In a run by itself ``refresh_every="auto"`` goes by the clock, so that no two runs are alike. A study settles the number
in a short training that nothing else is taken from, and gives it to every run of the method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from statistics import median

from lightning_modules.study.methods import Method, NSGDOptions
from lightning_modules.study.options import Study
from lightning_modules.support.files import Rows
from lightning_modules.support.study_folder import StudyFolder
from nsgd.directions.pace import interval_of
from nsgd.options import FROM_TRAINING

_EVERY, STEPS = 3, 16  # steps between two refreshes, and in all: six refreshes, of which the first is not timed

Train = Callable[[Method, NSGDOptions, int], Rows]  # steps of a method with these options: what each took


def rehearse(study: Study, folder: StudyFolder, method: Method, train: Train) -> None:
    """Measure how often a method refreshes, and keep it, where the clock would decide and nothing is kept yet.

    Runs that start at the same time, in several processes, take the number of the first that wrote one.

    Args:
        study: The study.
        folder: Where the number is kept.
        method: One of the study's.
        train: Trains a method for some steps, and returns their rows, with ``seconds`` and ``refreshes`` so far.
    """
    options = _by_the_clock(study, method)
    if options is not None and folder.refresh_every(method) is None:
        rows = train(method, replace(study.nsgd, refresh_every=_EVERY, warmup_steps=0), STEPS)
        folder.keep_refresh_every(method, interval_of(*prices(rows), options.overhead))


def rehearsed_options(study: Study, folder: StudyFolder, method: Method) -> NSGDOptions:
    """The options of NSGD that the runs of a method take: the study's own, with the number that was measured.

    Args:
        study: The study.
        folder: Where the number is kept.
        method: One of the study's, rehearsed before.
    """
    every = None if _by_the_clock(study, method) is None else folder.refresh_every(method)
    return study.nsgd if every is None else replace(study.nsgd, refresh_every=every)


def _by_the_clock(study: Study, method: Method) -> NSGDOptions | None:
    """Options of the directions of a method whose refreshes the clock would time; None of any other."""
    options = study.recipes[method].directions(study.given(method), study.nsgd)
    if options is None or options.refresh_every != "auto" or options.solver in (*FROM_TRAINING, "random"):
        return None
    return options


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
