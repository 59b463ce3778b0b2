"""The runs of a study: which there are, what each needs of the others, and with which settings each trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from lightning_modules.study.methods import RECIPES, Method, Settings
from lightning_modules.study.options import Study
from lightning_modules.study.tuning import chosen_settings, sweep_rates, trial_row, trial_settings
from lightning_modules.support.files import Rows, read_csv, write_yaml

Stage = Literal["tune", "study", "sweep"]
TUNING_SEED, _SWEEP_SEED = 1000, 2000  # never used by the study itself
_FOLDERS = {"tune": "tuning", "study": "runs", "sweep": "sweep"}


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
        """Its folder in that of the study."""
        return f"{_FOLDERS[self.stage]}/{self.method}-{self.index}"

    def finished(self, out: Path) -> bool:
        """Whether it has results, which are written last."""
        return (out / self.name / "results.csv").exists()

    def died(self, out: Path) -> bool:
        """Whether it was tried in vain."""
        return (out / self.name / "failed.txt").exists()


def plan_runs(study: Study) -> list[Run]:
    """Every run of a study, each after those that it needs."""
    tuned = [m for m in study.methods if RECIPES[m].more_of is None]
    runs: list[Run] = []

    def add(stage: Stage, method: Method, seed: int, index: int, needs: Sequence[int]) -> None:
        runs.append(Run(len(runs), stage, method, seed, index, tuple(needs)))

    for trial in range(study.tune):
        for method in tuned:
            add("tune", method, TUNING_SEED, trial, ())
    trials = [run.number for run in runs]  # of all methods: the target is frozen before the first run that counts
    for seed in range(study.seeds):
        for method in tuned:
            add("study", method, seed, seed, trials)
    paired = {(run.method, run.seed): run.number for run in runs if run.stage == "study"}
    for seed in range(study.seeds):
        for method in study.methods:
            if more_of := RECIPES[method].more_of:
                add("study", method, seed, seed, [*trials, paired[more_of[1], seed]])
    if study.sweep:
        for method in tuned:
            for point in range(study.sweep_points):
                add("sweep", method, _SWEEP_SEED, point, trials)
    return runs


def settle(study: Study, out: Path) -> dict[str, Any]:
    """Settings of every method and the target, frozen in settled.yaml before the first run that counts.

    Raises:
        ValueError: If all trials of a method died.
    """
    path = out / "settled.yaml"
    if path.exists():
        found: dict[str, Any] = yaml.safe_load(path.read_text())
        return found
    settings, target = chosen_settings(study, tuning_rows(study, out))
    settled = {"settings": settings, "target": target}
    write_yaml(path, settled)
    return settled


def tuning_rows(study: Study, out: Path) -> Rows:
    """One row for each finished trial: its settings, and what it scored."""
    return [
        trial_row(study, run.method, run.index, read_csv(out / run.name / "results.csv")[0])
        for run in plan_runs(study)
        if run.stage == "tune" and run.finished(out)
    ]


def settings_of(study: Study, out: Path, run: Run) -> Settings:
    """Hyperparameters that a run trains with: those of its trial, the settled ones, or these at its rate of a sweep."""
    if run.stage == "tune":
        return trial_settings(study, run.method)[run.index]
    settings: Settings = settle(study, out)["settings"][run.method]
    return settings if run.stage == "study" else {**settings, "lr": sweep_rates(study, run.method)[run.index]}


def steps_of(study: Study, out: Path, run: Run) -> int:
    """Optimizer steps of a run; of one that it is given the gradients of, if that is finished."""
    more_of = RECIPES[run.method].more_of
    path = out / "runs" / f"{more_of[1]}-{run.seed}" / "results.csv" if more_of else None
    return study.steps if path is None or not path.exists() else round(read_csv(path)[0]["gradients"])
