"""The runs of a study: which there are, what each needs of the others, and how one is made."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
import yaml
from scipy.stats import qmc
from torch import Tensor

from lightning_modules.averages import ReadOut, ReadOuts
from lightning_modules.callbacks import MEASUREMENTS, make_measurements
from lightning_modules.callbacks.record import RecordSteps
from lightning_modules.classifier import Classifier
from lightning_modules.data import ImageData, Images
from lightning_modules.methods import RECIPES, Method, Settings, damping_of, make_module, tuned_as
from lightning_modules.rows import Rows, read_csv, write_csv, write_yaml
from lightning_modules.study import Study

Stage = Literal["tune", "study", "sweep"]
OnStep = Callable[[int, float], None]  # steps done, their last loss

EVALUATED = 5000  # training images that the training loss of a read-out is taken on
_CALIBRATION = 2000  # training images that BatchNorm statistics are recalibrated on
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
    low, high = study.ranges(method).get("lr") or RECIPES[method].search["lr"]
    return [float(f"{lr:.4g}") for lr in np.geomspace(low, high, study.sweep_points)]


def settle(study: Study, out: Path) -> dict[str, Any]:
    """Settings of every method and the target, frozen in settled.yaml before the first run that counts.

    Raises:
        ValueError: If all trials of a method died.
    """
    path = out / "settled.yaml"
    if path.exists():
        found: dict[str, Any] = yaml.safe_load(path.read_text())
        return found
    settings = {method: study.given(method) for method in study.methods}
    target = study.target
    if study.tune:
        trials = tuning_rows(study, out)
        for method in study.methods:
            own = tuned_as(method)
            best = min((row for row in trials if row["method"] == own), key=_loss_of, default=None)
            if best is None:
                raise ValueError(f"every trial of {own} died; see {out}/tuning/{own}-0/failed.txt")
            settings[method] = trial_settings(study, own)[best["trial"]]
            if own == study.methods[0] and target is None:
                target = float(best["val_accuracy"])
    settled = {"settings": settings, "target": target}
    write_yaml(path, settled)
    return settled


def tuning_rows(study: Study, out: Path) -> Rows:
    """One row for each finished trial: its settings, validation loss and accuracy."""
    rows: Rows = []
    for run in plan_runs(study):
        if run.stage == "tune" and run.finished(out):
            scores = read_csv(out / run.name / "results.csv")[0]
            settings = trial_settings(study, run.method)[run.index]
            searched = {name: settings[name] for name in study.ranges(run.method)}
            scored = {name: scores[name] for name in ("val_loss", "val_accuracy", "train_loss")}
            rows.append({"method": run.method, "trial": run.index, **searched, **scored})
    return rows


def _loss_of(row: dict[str, Any]) -> float:
    return math.inf if math.isnan(row["val_loss"]) else float(row["val_loss"])


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
    settings, steps = _settings_of(study, out, run), steps_of(study, out, run)
    write_yaml(
        folder / "run.yaml", {"number": run.number, "method": run.method, "seed": run.seed, "steps": steps, **settings}
    )
    measured = study.measure if run.stage == "study" and run.seed == 0 else []
    measurements = make_measurements(measured, folder=folder)
    record, read_outs = RecordSteps(on_step, measurements), ReadOuts()
    module = _train(study, run.method, settings, run.seed, steps, measurements, [read_outs, record])
    write_csv(folder / "metrics.csv", record.rows)
    write_csv(folder / "results.csv", _results(study, run, settings, module, read_outs, record.rows[-1]))


def _train(
    study: Study,
    method: Method,
    settings: Settings,
    seed: int,
    steps: int,
    measurements: Sequence[pl.Callback],
    callbacks: Sequence[pl.Callback],
) -> Classifier:
    pl.seed_everything(seed, verbose=False)
    module = make_module(method, settings, study.nsgd, study.network(), seed=seed)
    directions = damping_of(method, settings, study.nsgd)
    refresh: list[pl.Callback] = [] if directions is None else [directions.callback()]
    with _quiet():
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=-1,
            max_steps=steps,
            callbacks=[*measurements, *refresh, *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, datamodule=study.data)
    return module


def _results(
    study: Study, run: Run, settings: Settings, module: Classifier, read_outs: ReadOuts, last: dict[str, Any]
) -> Rows:
    """One row for each read-out; the test images are scored by the study itself alone, once."""
    data, train = study.data, study.data.splits["train"]
    scored = {**data.splits, "train": Images(train.pixels[:EVALUATED], train.labels[:EVALUATED])}
    if run.stage != "study":
        del scored["test"]
    calibration = [data.normalise(part) for part in torch.split(train.pixels[:_CALIBRATION], data.batch_size)]
    counts = {name: last[name] for name in ("step", "gradients", "refreshes", "hvps")}
    rows = []
    wanted: Sequence[ReadOut] = read_outs.available if run.stage == "study" else ["last"]
    for name in wanted:
        with read_outs.applied(name, module, calibration):
            scores = {
                f"{split}_{measure}": value
                for split, images in scored.items()
                for measure, value in _score(module, data, images).items()
            }
        rows.append(
            {"method": run.method, "seed": run.seed, "read_out": name, "lr": settings["lr"], **scores, **counts}
        )
    return rows


@torch.no_grad()
def _score(module: Classifier, data: ImageData, images: Images) -> dict[str, float]:
    """Mean loss and accuracy on images as they are stored."""
    logits = torch.cat([module(data.normalise(part)) for part in torch.split(images.pixels, 500)])
    loss: Tensor = torch.nn.functional.cross_entropy(logits, images.labels)
    return {"loss": float(loss), "accuracy": float((logits.argmax(1) == images.labels).double().mean())}


def predicted_seconds(study: Study, out: Path, runs: Sequence[Run]) -> float:
    """What runs will take one after the other, from a few timed steps of each method and a scored batch of images."""
    torch.set_num_threads(study.threads)
    seconds: dict[Method, float] = {}
    images = study.data.splits
    for method in dict.fromkeys(run.method for run in runs):
        record = RecordSteps(lambda step, loss: None)
        module = _train(study, method, study.given(method), _TUNING_SEED, _TIMED_STEPS, [], [record])
        began = time.perf_counter()
        batch = Images(images["val"].pixels[:500], images["val"].labels[:500])
        with torch.inference_mode():
            _score(module.eval(), study.data, batch)
        scoring = (time.perf_counter() - began) / len(batch.labels)
        first, last = record.rows[0], record.rows[-1]
        step = (last["seconds"] - first["seconds"]) / (len(record.rows) - 1)
        if 0 < first["refreshes"] == last["refreshes"]:  # one in the first step, and no other among those timed
            options = study.nsgd
            every = (
                (first["gradients"] - 1) / options.overhead
                if options.refresh_every == "auto"
                else options.refresh_every
            )
            step += first["seconds"] / max(1.0, every)
        scored = study.epochs * len(images["val"].labels) + 4 * sum(min(len(i.labels), 10_000) for i in images.values())
        seconds[method] = study.steps * step + scored * scoring
    return sum(seconds[run.method] * steps_of(study, out, run) / study.steps for run in runs)


def ignore_lightning_noise() -> None:
    """Silence two warnings: on worker processes, which would slow indexed tensors down, and on Lightning's own code."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.* is deprecated.*")


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave the terminal to the progress bar: none of Lightning's notes on hardware, workers and epochs."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            ignore_lightning_noise()
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
