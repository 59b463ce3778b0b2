"""The runs of a study: which there are, what each needs of the others, and with which settings each trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_modules.study.methods import Method, Settings
from lightning_modules.study.options import Study
from lightning_modules.study.runs.subject import Subject
from lightning_modules.study.tuning import chosen_settings, sweep_rates, trial_row, trial_settings
from lightning_modules.support.files import Rows
from lightning_modules.support.study_folder import Stage, StudyFolder, run_name

TUNING_SEED, _SWEEP_SEED = 1000, 2000  # never used by the study itself


@dataclass(frozen=True)
class Run:
    """One training of one method."""

    number: int
    stage: Stage
    method: Method
    seed: int
    index: int  # trial, seed, or point of the sweep
    needs: tuple[int, ...]  # runs whose results it is made from

    @property
    def name(self) -> str:
        """Of its files in the folder of the study."""
        return run_name(self.stage, self.method, self.index)


def plan_runs(study: Study) -> list[Run]:
    """Every run of a study, each after those that it needs."""
    first = [m for m, recipe in study.recipes.items() if recipe.more_of is None]
    runs: list[Run] = []

    def add(stage: Stage, method: Method, seed: int, index: int, needs: Sequence[int]) -> None:
        runs.append(Run(len(runs), stage, method, seed, index, tuple(needs)))

    for trial in range(study.tune):
        for method in (m for m in first if study.ranges(m)):
            add("tune", method, TUNING_SEED, trial, ())
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
            for point in range(study.sweep_points):
                add("sweep", method, _SWEEP_SEED, point, trials)
    return runs


def settle(study: Study, folder: StudyFolder) -> None:
    """Fix the settings of every method and the target, before the first run that counts; what is fixed stays.

    Raises:
        ValueError: If all trials of a method died.
    """
    if not folder.settled:
        settings, target = chosen_settings(study, tuning_rows(study, folder))
        folder.settle(settings, target)


def tuning_rows(study: Study, folder: StudyFolder) -> Rows:
    """One row for each finished trial: its settings, and what it scored."""
    return [
        trial_row(study, run.method, run.index, folder.run(run.name).results()[0])
        for run in plan_runs(study)
        if run.stage == "tune" and folder.run(run.name).finished
    ]


def settings_of(study: Study, folder: StudyFolder, run: Run) -> Settings:
    """Hyperparameters that a run trains with: those of its trial, the settled ones, or these at its rate of a sweep."""
    if run.stage == "tune":
        return trial_settings(study, run.method)[run.index]
    settings: Settings = folder.document("settled")["settings"][run.method]
    return settings if run.stage == "study" else {**settings, "lr": sweep_rates(study, run.method)[run.index]}


def steps_of(subject: Subject, folder: StudyFolder, run: Run) -> int:
    """Optimizer steps of a run; of one that it is given the gradients of, if that is finished."""
    if more_of := subject.study.recipes[run.method].more_of:
        other = folder.run(run_name("study", more_of[1], run.seed))
        if other.finished:
            return round(float(other.results()[0]["gradients"]))
    return subject.steps
