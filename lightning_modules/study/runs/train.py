"""One run of a study: trained, read out, and written into its folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_modules.callbacks.averages import ReadOuts
from lightning_modules.callbacks.epoch_checkpoint import EpochCheckpoint
from lightning_modules.callbacks.evaluation_weights import EvaluationWeights
from lightning_modules.callbacks.gradient_noise import GradientNoise
from lightning_modules.callbacks.measurements import MEASUREMENTS, make_measurements
from lightning_modules.callbacks.plateau import ReduceOnPlateau
from lightning_modules.callbacks.record import RecordSteps
from lightning_modules.callbacks.refresh import RefreshDirections
from lightning_modules.models.base import Split
from lightning_modules.study.methods import Method, NSGDOptions, Settings, prepare
from lightning_modules.study.options import Study
from lightning_modules.study.rehearsal import rehearse, rehearsed_options
from lightning_modules.study.runs.evaluate import score_read_outs
from lightning_modules.study.runs.memory import held_share
from lightning_modules.study.runs.plan import Run, decide, plan_runs, settings_of, steps_of
from lightning_modules.study.runs.subject import Subject
from lightning_modules.study.tuning import TUNING_SEED
from lightning_modules.support.files import Rows
from lightning_modules.support.quiet import quiet
from lightning_modules.support.read_outs import READ_OUTS
from lightning_modules.support.score import EVALUATED
from lightning_modules.support.study_folder import StudyFolder, run_name

OnStep = Callable[[int, float], None]  # steps done, their last loss
_TIMED_STEPS = 8


def make_run(subject: Subject, folder: StudyFolder, run: Run, on_step: OnStep) -> None:
    """Train once, and write run.yaml, metrics.csv and, last, results.csv into its folder.

    Where data and model are ours, whose batches are a function of seed and epoch, a run of more than half a minute
    keeps a checkpoint at the ends of epochs, and goes on from it when it is made again.

    Raises:
        ValueError: If a run that it needs has no results.
    """
    study, plan = subject.study, plan_runs(subject.study)
    # What is settled needs no tuning any more: studies of older versions have no repeats.
    needs = [number for number in run.needs if not (folder.settled and plan[number].tunes)]
    done = {number: folder.run(plan[number].name) for number in needs}
    if missing := [number for number, files in done.items() if not (files.finished or files.died)]:
        raise ValueError(
            f"run {run.number}, {run.name}, needs runs {', '.join(map(str, missing))} of {folder.path} first; start "
            "those"
        )
    if more_of := study.recipes[run.method].more_of:
        other = run_name("study", more_of[1], run.seed)
        if not folder.run(other).finished:
            raise ValueError(f"{run.name} takes as many gradients as {other.split('/')[1]}, which died")
    decide(study, folder, run)
    rehearse_method(subject, folder, run.method)
    settings, steps = settings_of(study, folder, run), steps_of(subject, folder, run)
    nsgd = rehearsed_options(study, folder, run.method)
    refreshes = {} if nsgd == study.nsgd else {"refresh_every": nsgd.refresh_every}
    plain = {"number": run.number, "method": run.method, "seed": run.seed, "steps": steps, **settings, **refreshes}
    files = folder.run(run.name)
    files.begin(plain, measurements=MEASUREMENTS)
    measured = study.measure if run.stage == "study" and run.seed == 0 else []
    measurements = make_measurements(
        measured, samples=study.measure_samples, overhead=study.measure_overhead, folder=files.path
    )
    counted = run.stage == "study"
    best_by = (study.score.monitor, study.score.mode) if counted and study.spectrum is not None else None
    record = RecordSteps(on_step, study.score.validated, measurements)
    read_outs = ReadOuts(best_by=best_by, more=_averages(study, run.method) if counted else [])
    read_outs.apart = record.apart
    kept = None if measured or not subject.goes_on else EpochCheckpoint(files.checkpoint, plain)
    trainer = _train(subject, run.method, settings, nsgd, run.seed, steps, record, [read_outs], measurements, kept)
    refreshed = [c for c in trainer.callbacks if isinstance(c, RefreshDirections)]  # type: ignore[attr-defined]
    results = _results(subject, run, settings, trainer, read_outs, record.rows[-1])
    files.end(record.rows, results, one_by_one=any(c.one_by_one for c in refreshed))


def rehearse_method(subject: Subject, folder: StudyFolder, method: Method) -> None:
    """Measure how often a method refreshes, where the clock would decide, and keep it for its runs.

    As in :func:`lightning_modules.study.rehearsal.rehearse`.
    """

    def train(method: Method, nsgd: NSGDOptions, steps: int) -> Rows:
        record = RecordSteps(lambda step, loss: None)
        _train(subject, method, subject.study.given(method), nsgd, TUNING_SEED, steps, record)
        return record.rows

    rehearse(subject.study, folder, method, train)


def _train(
    subject: Subject,
    method: Method,
    settings: Settings,
    nsgd: NSGDOptions,
    seed: int,
    steps: int,
    record: RecordSteps,
    read_outs: Sequence[pl.Callback] = (),
    measurements: Sequence[pl.Callback] = (),
    kept: EpochCheckpoint | None = None,
) -> pl.Trainer:
    torch.set_num_threads(subject.study.threads)
    pl.seed_everything(seed, verbose=False)
    module = subject.module()
    recipe = subject.study.recipes[method]
    prepare(module, recipe, settings, nsgd, seed=seed, schedule=subject.study.schedule, steps=steps)
    directions = recipe.directions(settings, nsgd)
    refresh = [] if directions is None else directions.refresh()
    noise = [GradientNoise(recipe.noise, seed)] if recipe.noise else []
    schedule = recipe.followed(subject.study.schedule)
    waits = None if schedule is None else schedule.patience
    falls = [] if waits is None else [ReduceOnPlateau(waits, subject.study.score)]
    callbacks = [*noise, *measurements, *refresh, record, *read_outs, EvaluationWeights(record.apart), *falls]
    checkpoint = None
    if kept is not None:
        callbacks, checkpoint = [*callbacks, kept], kept.found()
    with quiet():
        trainer = subject.trainer(max_epochs=-1, max_steps=steps, callbacks=callbacks, gradient_clip_val=recipe.clip)
        trainer.fit(module, datamodule=subject.data(method), ckpt_path=checkpoint, weights_only=True)
    if trainer.global_step != steps:
        raise RuntimeError(f"expected {steps} steps, {trainer.global_step} were made; something ended the training")
    return trainer


def _results(
    subject: Subject, run: Run, settings: Settings, trainer: pl.Trainer, read_outs: ReadOuts, last: dict[str, Any]
) -> Rows:
    """One row for each read-out; the test data are seen by the study itself alone, once."""
    counted = run.stage == "study"
    stages: list[Split] = ["val", "test"] if counted and subject.is_tested else ["val"]
    wanted = read_outs.available if counted else ["last"]
    counts = {name: last[name] for name in ("step", "gradients", "refreshes", "hvps")}
    counts["state"] = round(held_share(trainer.optimizers), 3)
    about = {"method": run.method, "seed": run.seed}
    rate = {"lr": settings["lr"]} if "lr" in settings else {}  # not where the module sets it
    study = subject.study
    scored = score_read_outs(
        trainer,
        read_outs,
        wanted,
        judge=subject.trainer,
        score=study.score,
        stages=stages,
        test_batches=study.limit_test,
        spectrum=study.spectrum if counted else None,
    )
    return [{**about, "read_out": name, **rate, **scores, **counts} for name, scores in scored]


def _averages(study: Study, method: Method) -> list[str]:
    """What a method's runs are read out with beside what all are: not where the schedule stands for an average."""
    schedule = study.recipes[method].followed(study.schedule)
    return [] if schedule is not None and schedule.average is not None else study.averages


def warm_up(subject: Subject, folder: StudyFolder, method: Method) -> RecordSteps:
    """Train a method for a few steps and a validation, of which no run sees anything; returns what they took.

    What a process does once, such as loading libraries and kernels, is done then, and is in no run's seconds.
    """
    record = RecordSteps(lambda step, loss: None)
    rehearse_method(subject, folder, method)
    options = rehearsed_options(subject.study, folder, method)
    _train(subject, method, subject.study.given(method), options, TUNING_SEED, _TIMED_STEPS, record)
    return record


def predicted_seconds(subject: Subject, folder: StudyFolder, runs: Sequence[Run]) -> float:
    """What runs will take one after the other, from a few timed steps of each method and a validation."""
    study = subject.study
    seconds: dict[Method, float] = {}
    train = subject.loader("train")
    evaluated = min(1.0, EVALUATED / max(1, len(train.dataset))) * len(train)
    batches = {stage: _batches(subject.loader(stage)) for stage in ("val", "test")}
    for method in dict.fromkeys(run.method for run in runs):
        record = warm_up(subject, folder, method)
        options = rehearsed_options(study, folder, method)
        first, last = record.rows[0], record.rows[-1]
        step = (last["seconds"] - first["seconds"]) / max(1, len(record.rows) - 1)
        if 0 < first["refreshes"] == last["refreshes"]:  # one in the first step, and no other among those timed
            every = (
                (first["gradients"] - 1) / options.overhead
                if options.refresh_every == "auto"
                else options.refresh_every
            )
            step += first["seconds"] / max(1.0, every)
        read = len(READ_OUTS) + len(_averages(study, method))
        scored = (study.recipes[method].epochs or study.epochs) * batches["val"] + read * (
            sum(batches.values()) + evaluated
        )
        seconds[method] = subject.steps(method) * step + scored * record.validating / max(
            1, batches["val"] * record.validations
        )
    return sum(seconds[run.method] * steps_of(subject, folder, run) / subject.steps(run.method) for run in runs)


def _batches(loader: Any) -> int:
    """Batches of a loader, or of several together; of unknown length, none."""
    if isinstance(loader, list | tuple):
        return sum(_batches(one) for one in loader)
    try:
        return len(loader)
    except TypeError:
        return 0
