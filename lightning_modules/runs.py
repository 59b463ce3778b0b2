"""The runs of a study: which there are, what each needs of the others, and how one is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import yaml

from lightning_modules.averages import READ_OUTS, ReadOut, ReadOuts
from lightning_modules.callbacks import MEASUREMENTS, make_measurements
from lightning_modules.callbacks.record import RecordSteps
from lightning_modules.methods import RECIPES, Method, NSGDOptions, Settings, damping_of, prepare
from lightning_modules.quiet import quiet, quiet_trainer
from lightning_modules.rehearsal import settled_options
from lightning_modules.rows import Rows, read_csv, write_csv, write_yaml
from lightning_modules.scoring import EVALUATED, score_read_outs
from lightning_modules.stages import Split
from lightning_modules.study import Study
from lightning_modules.tuning import chosen_settings, sweep_rates, trial_row, trial_settings

Stage = Literal["tune", "study", "sweep"]
OnStep = Callable[[int, float], None]  # steps done, their last loss

_TUNING_SEED, _SWEEP_SEED = 1000, 2000  # never used by the study itself
_TIMED_STEPS = 8
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
            add("tune", method, _TUNING_SEED, trial, ())
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


# -- what a run trains with ----------------------------------------------------------------------------------------


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


def _settings_of(study: Study, out: Path, run: Run) -> Settings:
    if run.stage == "tune":
        return trial_settings(study, run.method)[run.index]
    settings: Settings = settle(study, out)["settings"][run.method]
    return settings if run.stage == "study" else {**settings, "lr": sweep_rates(study, run.method)[run.index]}


def steps_of(study: Study, out: Path, run: Run) -> int:
    """Optimizer steps of a run; of one that it is given the gradients of, if that is finished."""
    more_of = RECIPES[run.method].more_of
    path = out / "runs" / f"{more_of[1]}-{run.seed}" / "results.csv" if more_of else None
    return study.steps if path is None or not path.exists() else round(read_csv(path)[0]["gradients"])


# -- one run -------------------------------------------------------------------------------------------------------


def make_run(study: Study, out: Path, run: Run, on_step: OnStep) -> None:
    """Train once, and write run.yaml, metrics.csv and, last, results.csv into its folder.

    Raises:
        ValueError: If a run that it needs has no results.
    """
    plan = plan_runs(study)
    missing = [n for n in run.needs if not (plan[n].finished(out) or plan[n].died(out))]
    if missing:
        raise ValueError(
            f"run {run.number}, {run.name}, needs runs {', '.join(map(str, missing))} of {out} first; start those"
        )
    if (more_of := RECIPES[run.method].more_of) and not (
        out / "runs" / f"{more_of[1]}-{run.seed}" / "results.csv"
    ).exists():
        raise ValueError(f"{run.name} takes as many gradients as {more_of[1]}-{run.seed}, which died")
    folder = out / run.name
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*(f"{name}.csv" for name in MEASUREMENTS), "failed.txt"):
        (folder / name).unlink(missing_ok=True)  # of a run that was interrupted
    torch.set_num_threads(study.threads)
    settings, steps, nsgd = _settings_of(study, out, run), steps_of(study, out, run), options_of(study, out, run.method)
    settled = {} if nsgd == study.nsgd else {"refresh_every": nsgd.refresh_every}
    own = {"number": run.number, "method": run.method, "seed": run.seed, "steps": steps}
    write_yaml(folder / "run.yaml", {**own, **settings, **settled})
    measured = study.measure if run.stage == "study" and run.seed == 0 else []
    measurements = make_measurements(measured, folder=folder)
    record, read_outs = RecordSteps(on_step, study.score.validated, measurements), ReadOuts()
    trainer = _train(study, run.method, settings, nsgd, run.seed, steps, measurements, [read_outs, record])
    write_csv(folder / "metrics.csv", record.rows)
    write_csv(folder / "results.csv", _results(study, run, settings, trainer, read_outs, record.rows[-1]))


def options_of(study: Study, out: Path, method: Method) -> NSGDOptions:
    """The options of NSGD that every run of a method takes; how often it refreshes is measured first, where it is not.

    As in :func:`lightning_modules.rehearsal.settled_options`.
    """

    def train(method: Method, nsgd: NSGDOptions, steps: int) -> Rows:
        torch.set_num_threads(study.threads)
        record = RecordSteps(lambda step, loss: None)
        _train(study, method, study.given(method), nsgd, _TUNING_SEED, steps, [], [record])
        return record.rows

    return settled_options(study, out, method, train)


def _train(
    study: Study,
    method: Method,
    settings: Settings,
    nsgd: NSGDOptions,
    seed: int,
    steps: int,
    measurements: Sequence[pl.Callback],
    callbacks: Sequence[pl.Callback],
) -> pl.Trainer:
    pl.seed_everything(seed, verbose=False)
    module = study.module()
    prepare(module, method, settings, nsgd, seed=seed)
    directions = damping_of(method, settings, nsgd)
    refresh = [] if directions is None else directions.refresh()
    with quiet():
        trainer = quiet_trainer(max_epochs=-1, max_steps=steps, callbacks=[*measurements, *refresh, *callbacks])
        trainer.fit(module, datamodule=study.fresh_data())
    if trainer.global_step != steps:
        raise RuntimeError(f"expected {steps} steps, {trainer.global_step} were made; something ended the training")
    return trainer


def _results(
    study: Study, run: Run, settings: Settings, trainer: pl.Trainer, read_outs: ReadOuts, last: dict[str, Any]
) -> Rows:
    """One row for each read-out; the test data are seen by the study itself alone, once."""
    counted = run.stage == "study"
    stages: list[Split] = ["val", "test"] if counted and study.is_tested else ["val"]
    wanted: Sequence[ReadOut] = read_outs.available if counted else ["last"]
    counts = {name: last[name] for name in ("step", "gradients", "refreshes", "hvps")}
    own = {"method": run.method, "seed": run.seed}
    return [
        {**own, "read_out": name, "lr": settings["lr"], **scores, **counts}
        for name, scores in score_read_outs(trainer, read_outs, wanted, score=study.score, stages=stages)
    ]


def predicted_seconds(study: Study, out: Path, runs: Sequence[Run]) -> float:
    """What runs will take one after the other, from a few timed steps of each method and a validation."""
    torch.set_num_threads(study.threads)
    seconds: dict[Method, float] = {}
    train = study.loader_of("train")
    evaluated = min(1.0, EVALUATED / max(1, len(train.dataset))) * len(train)
    batches = {stage: _batches(study.loader_of(stage)) for stage in ("val", "test")}
    for method in dict.fromkeys(run.method for run in runs):
        record = RecordSteps(lambda step, loss: None)
        options = options_of(study, out, method)
        _train(study, method, study.given(method), options, _TUNING_SEED, _TIMED_STEPS, [], [record])
        first, last = record.rows[0], record.rows[-1]
        step = (last["seconds"] - first["seconds"]) / max(1, len(record.rows) - 1)
        if 0 < first["refreshes"] == last["refreshes"]:  # one in the first step, and no other among those timed
            every = (
                (first["gradients"] - 1) / options.overhead
                if options.refresh_every == "auto"
                else options.refresh_every
            )
            step += first["seconds"] / max(1.0, every)
        scored = study.epochs * batches["val"] + len(READ_OUTS) * (sum(batches.values()) + evaluated)
        seconds[method] = study.steps * step + scored * record.validating / max(1, batches["val"])
    return sum(seconds[run.method] * steps_of(study, out, run) / study.steps for run in runs)


def _batches(loader: Any) -> int:
    """Batches of a loader, or of several together; of unknown length, none."""
    if isinstance(loader, list | tuple):
        return sum(_batches(one) for one in loader)
    try:
        return len(loader)
    except TypeError:
        return 0
