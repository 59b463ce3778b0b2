"""The runs of a study: which there are, what each needs of the others, and with which settings each trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_modules.study.methods import Method, Settings
from lightning_modules.study.options import Study
from lightning_modules.study.runs.subject import Subject
from lightning_modules.study.tuning import (
    REPEAT_SEEDS,
    TUNING_SEED,
    best_trials,
    chosen_settings,
    repeats,
    sweep_rates,
    trial_row,
    trial_settings,
)
from lightning_modules.support.files import Rows
from lightning_modules.support.study_folder import Stage, StudyFolder, run_name

_SWEEP_SEED = 2000  # and those after it: never used by the study itself


@dataclass(frozen=True)
class Run:
    """One training of one method."""

    number: int
    stage: Stage
    method: Method
    seed: int
    index: int  # trial, repeat, seed, or point of the sweep, those of its first seed first
    needs: tuple[int, ...]  # runs whose results it is made from

    @property
    def name(self) -> str:
        """Of its files in the folder of the study."""
        return run_name(self.stage, self.method, self.index)

    @property
    def tunes(self) -> bool:
        """Whether settings are chosen by it."""
        return self.stage in ("tune", "again")


def plan_runs(study: Study) -> list[Run]:
    """Every run of a study, each after those that it needs."""
    first = [m for m, recipe in study.recipes.items() if recipe.more_of is None]
    runs: list[Run] = []

    def add(stage: Stage, method: Method, seed: int, index: int, needs: Sequence[int]) -> None:
        runs.append(Run(len(runs), stage, method, seed, index, tuple(needs)))

    tuned = [m for m in first if study.ranges(m)]
    for trial in range(study.tune):
        for method in tuned:
            add("tune", method, TUNING_SEED, trial, ())
    needed = {method: [run.number for run in runs if run.method == method] for method in tuned}
    for index, (_, seed) in enumerate(repeats(study)):
        for method in tuned:
            add("again", method, seed, index, needed[method])
    trials = [run.number for run in runs]  # of all methods: the target is frozen before the first run that counts
    for seed in range(study.seeds):
        for method in first:
            add("study", method, seed, seed, trials)
    paired = {(run.method, run.seed): run.number for run in runs if run.stage == "study"}
    for seed in range(study.seeds):
        for method, recipe in study.recipes.items():
            if more_of := recipe.more_of:
                add("study", method, seed, seed, [*trials, paired[more_of[1], seed]])
    if study.sweep:
        for method in (m for m in first if "lr" in study.recipes[m].defaults):
            for index in range(study.sweep_points * study.sweep_seeds):
                add("sweep", method, _SWEEP_SEED + index // study.sweep_points, index, trials)
    return runs


def runs_left(folder: StudyFolder, plan: Sequence[Run]) -> list[Run]:
    """The runs that are not finished, but for trials and repeats that come too late to be chosen."""
    return [
        run
        for run in plan
        if not folder.run(run.name).finished
        and not (run.tunes and folder.settled)
        and not (run.stage == "tune" and folder.finalists(run.method))
        and has_trial(folder, run)
    ]


def has_trial(folder: StudyFolder, run: Run) -> bool:
    """Whether there is something for a run to repeat: fewer trials than were planned for may have survived."""
    finalists = folder.finalists(run.method) if run.stage == "again" else []
    return not finalists or run.index // len(REPEAT_SEEDS) < len(finalists)


def check_trials(study: Study, folder: StudyFolder) -> None:
    """Refuse to go on with trials that were not drawn from today's ranges, which an older version may have begun.

    Raises:
        ValueError: If there are any, and nothing is settled by them yet.
    """
    if folder.settled:
        return
    begun = [(run, folder.run(run.name).settings()) for run in plan_runs(study) if run.stage == "tune"]
    for run, tried in begun:
        wanted = trial_settings(study, run.method)[run.index] if tried else {}
        for name in study.ranges(run.method) if tried else ():
            if tried.get(name) != wanted[name]:
                raise ValueError(
                    f"{folder.path / run.name} was begun by another version of nsgd, with {name} {tried.get(name)} "
                    f"where this one tries {wanted[name]}; finish the study with that version, or choose another "
                    "folder with --out"
                )


def decide(study: Study, folder: StudyFolder, run: Run) -> None:
    """Fix what a run goes by, before the first one that does; what is fixed stays.

    Of a repeat these are the best trials of its method; of a run that counts, the settings of every method.

    Raises:
        ValueError: If all trials of a method died, or diverged.
    """
    if run.stage == "again":
        _finalists(study, folder, run.method)
    elif run.stage != "tune":
        settle(study, folder)


def _finalists(study: Study, folder: StudyFolder, method: Method) -> list[int]:
    """The trials of a method to choose from, the best first."""
    if not folder.finalists(method):
        folder.keep_finalists(method, best_trials(study, method, tuning_rows(study, folder)))
    return folder.finalists(method)


def settle(study: Study, folder: StudyFolder) -> None:
    """Fix the settings of every method and the target, before the first run that counts; what is fixed stays.

    Raises:
        ValueError: If all trials of a method died, or diverged.
    """
    if not folder.settled:
        tuned = dict.fromkeys(run.method for run in plan_runs(study) if run.tunes)
        finalists = {method: _finalists(study, folder, method) for method in tuned}
        settings, target = chosen_settings(study, tuning_rows(study, folder), finalists)
        folder.settle(settings, target)


def tuning_rows(study: Study, folder: StudyFolder) -> Rows:
    """One row for each finished trial and repeat: its settings, and what it scored."""
    found = [(run, folder.run(run.name)) for run in plan_runs(study) if run.tunes]
    return [
        trial_row(study, run.method, _trial(folder, run), run.seed, files.settings(), files.results()[0])
        for run, files in found
        if files.finished
    ]


def _trial(folder: StudyFolder, run: Run) -> int:
    """The trial that a run is, or repeats.

    Raises:
        ValueError: If so many trials did not survive.
    """
    if run.stage == "tune":
        return run.index
    rank, finalists = run.index // len(REPEAT_SEEDS), folder.finalists(run.method)
    if rank >= len(finalists):
        raise ValueError(
            f"{run.name} repeats trial number {rank + 1} of {run.method}, the best first, and only {len(finalists)} "
            "did not die"
        )
    return finalists[rank]


def settings_of(study: Study, folder: StudyFolder, run: Run) -> Settings:
    """Hyperparameters that a run trains with: those of its trial, the settled ones, or these at its rate of a sweep.

    Raises:
        ValueError: If the trial that it repeats died.
    """
    if run.tunes:
        return trial_settings(study, run.method)[_trial(folder, run)]
    settings: Settings = folder.document("settled")["settings"][run.method]
    if run.stage == "study":
        return settings
    return {**settings, "lr": sweep_rates(study, run.method)[run.index % study.sweep_points]}


def steps_of(subject: Subject, folder: StudyFolder, run: Run) -> int:
    """Optimizer steps of a run; of one that it is given the gradients of, if that is finished."""
    if more_of := subject.study.recipes[run.method].more_of:
        other = folder.run(run_name("study", more_of[1], run.seed))
        if other.finished:
            return round(float(other.results()[0]["gradients"]))
    return subject.steps(run.method)
