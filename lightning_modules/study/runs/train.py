"""One run of a study: trained, read out, and written into its folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_modules.callbacks.averages import READ_OUTS, ReadOut, ReadOuts
from lightning_modules.callbacks.measurements import MEASUREMENTS, make_measurements
from lightning_modules.callbacks.record import RecordSteps
from lightning_modules.models.base import Split
from lightning_modules.study.methods import RECIPES, Method, NSGDOptions, Settings, damping_of
from lightning_modules.study.optimizers import prepare, refresh_callbacks
from lightning_modules.study.options import Study
from lightning_modules.study.rehearsal import settled_options
from lightning_modules.study.runs.evaluate import score_read_outs
from lightning_modules.study.runs.plan import TUNING_SEED, Run, plan_runs, settings_of, steps_of
from lightning_modules.study.score import EVALUATED
from lightning_modules.support.files import Rows, write_csv, write_yaml
from lightning_modules.support.quiet import quiet, quiet_trainer

OnStep = Callable[[int, float], None]  # steps done, their last loss
_TIMED_STEPS = 8


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
    settings, steps, nsgd = settings_of(study, out, run), steps_of(study, out, run), options_of(study, out, run.method)
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

    As in :func:`lightning_modules.study.rehearsal.settled_options`.
    """

    def train(method: Method, nsgd: NSGDOptions, steps: int) -> Rows:
        torch.set_num_threads(study.threads)
        record = RecordSteps(lambda step, loss: None)
        _train(study, method, study.given(method), nsgd, TUNING_SEED, steps, [], [record])
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
    refresh = [] if directions is None else refresh_callbacks(directions)
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
        _train(study, method, study.given(method), options, TUNING_SEED, _TIMED_STEPS, [], [record])
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
