"""The study behind ``nsgd compare``: methods x seeds x read-outs, with paired statistics.

Every method starts from the same weights and sees the same batches for the same seed, so differences are paired.
Work is counted in gradients (forward and backward passes on a training batch), refreshes included.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytorch_lightning as pl
import torch
import yaml
from scipy import stats
from torch import Tensor

from lightning_modules.averages import ReadOuts
from lightning_modules.callbacks import MEASUREMENTS, make_measurements
from lightning_modules.callbacks.record import RecordSteps
from lightning_modules.callbacks.refresh import RefreshDirections
from lightning_modules.classifier import Classifier
from lightning_modules.data import Digits, ImageData, Images
from lightning_modules.nets import NetName, make_net
from lightning_modules.rows import Rows, read_csv, write_csv
from lightning_modules.study_folder import claim_folder
from nsgd import NSGD
from nsgd.low_rank import Which
from nsgd.options import Estimator

Method = Literal["sgd", "nsgd", "bulk-sgd", "dom-sgd"]

GRID = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # every method's learning rate comes from here
TUNING_SEEDS = (1000, 1001, 1002)  # never used by a study
# Least mean validation loss over the tuning seeds, at the default settings: benchmarks/results/digits-tuning.csv,
# the tuning.csv of `nsgd compare --methods [sgd,nsgd,bulk-sgd,dom-sgd] --lr grid`.
TUNED = {("Digits", "mlp", 0.0): {"sgd": 0.5, "nsgd": 0.5, "bulk-sgd": 0.5, "dom-sgd": 0.05}}

EVALUATED = 5000  # training images that the training loss of a read-out is taken on
_CALIBRATION = 2000  # training images that BatchNorm statistics are recalibrated on


@dataclass(frozen=True)
class NSGDOptions:
    """Options of NSGD and of its refreshes; the methods other than nsgd set gamma and bulk_scale themselves.

    Args:
        k: Number of directions.
        gamma: Factor on the step along them.
        refresh_every: Steps between two refreshes, or "auto" for as many as ``overhead`` pays.
        overhead: Gradients a step that refreshes may cost, with "auto".
        decay: Share of the last directions in their running average; null for 0.95 with gradients, else 0.
        samples: Samples that the directions come from; null for the whole batch.
        group_size: Samples in a group, whose gradients give the directions; null for 1, or 8 with BatchNorm.
        source: "batch" for a slice of the running batch, "train" for a fresh sample of the training set.
        which: "LA", "LM" or "SA".
        bulk_scale: Factor on the step outside the directions.
        solver: "gradients" (of groups), "lanczos" or "arpack"; "auto" is "gradients" where the batch can be cut.
        warmup_steps: Steps before the first refresh.
    """

    k: int = 20
    gamma: float = 0.1
    refresh_every: int | Literal["auto"] = "auto"
    overhead: float = 0.1
    decay: float | None = None
    samples: int | None = 32
    group_size: int | None = None
    source: Literal["batch", "train"] = "batch"
    which: Which = "LA"
    bulk_scale: float = 1.0
    solver: Estimator = "auto"
    warmup_steps: int = 0

    def callback(self) -> RefreshDirections:
        """The callback that refreshes with these options."""
        return RefreshDirections(samples=self.samples, group_size=self.group_size, source=self.source)


@dataclass(frozen=True)
class Study:
    """Train every method with every seed, and compare the weights and their averages.

    Args:
        data: Digits, or HuggingFace with ``--data.path``.
        net: mlp, simple-cnn (the 2019 paper's), simple-cnn-root (smaller) or resnet-20.
        methods: Any of sgd, nsgd, bulk-sgd (gamma = 0) and dom-sgd (gamma = 1, bulk_scale = 0).
        seeds: Number of paired seeds.
        epochs: Epochs of each run.
        lr: One learning rate for all methods; "grid" to tune each on the grid first, by validation loss; or "tuned"
            for the values found beforehand for digits with the mlp and no momentum (elsewhere 0.1, and the report
            says untuned).
        momentum: Momentum of every method.
        threads: Threads of torch. They change the numbers, so they belong to the study.
        measure: What to measure along the first seed of each method, any of sharpness, valley, quadratic and
            averaging, or all; each for at most 15 gradients in 100 of training, outside its seconds.
        nsgd: Options of NSGD.
    """

    data: ImageData = field(default_factory=Digits)
    net: NetName = "mlp"
    methods: list[Method] = field(default_factory=lambda: ["sgd", "nsgd", "bulk-sgd"])
    seeds: int = 5
    epochs: int = 40
    lr: float | Literal["tuned", "grid"] = "tuned"
    momentum: float = 0.0
    threads: int = 1
    measure: list[str] = field(default_factory=list)
    nsgd: NSGDOptions = field(default_factory=NSGDOptions)

    def resolved(self) -> dict[str, Any]:
        """Everything that the numbers depend on, as plain values."""
        kind = type(self.data)
        data = {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": dict(self.data.hparams)}
        rest = {
            name: getattr(self, name)
            for name in ("net", "methods", "seeds", "epochs", "lr", "momentum", "threads", "measure")
        }
        return {"data": data, **rest, "nsgd": asdict(self.nsgd)}

    def check(self) -> None:
        """Raise a ValueError for what cannot run, before anything does."""
        for name, least in (("seeds", 1), ("epochs", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} of at least {least}, got {getattr(self, name)}")
        unknown = [m for m in self.methods if m not in get_args(Method)]
        if unknown or not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(
                f"expected methods to be different ones of {', '.join(get_args(Method))}, got {self.methods}"
            )
        if isinstance(self.lr, str) and self.lr not in ("tuned", "grid"):
            raise ValueError(f"expected lr to be a number, tuned or grid, got {self.lr!r}")
        if not isinstance(self.lr, str) and not 0 <= self.lr < math.inf:
            raise ValueError(f"expected lr >= 0 and finite, got {self.lr}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"expected momentum >= 0 and below 1, got {self.momentum}")
        make_measurements(self.measure)
        callback = self.nsgd.callback()
        net = make_net(self.net, self.data.input_shape, self.data.num_classes)
        callback.check_samples([self.nsgd.solver], net)
        for method in self.methods:
            make_optimizer(self, method, 0.1, net.parameters())

    @property
    def steps(self) -> int:
        """Optimizer steps of one run."""
        return self.epochs * len(self.data.train_dataloader())


Progress = Callable[[str, int, float | None], None]  # what is running, steps done in all, its loss


def factors(method: str, gamma: float, bulk_scale: float) -> tuple[float, float]:
    """Factors of a method on the step along the directions and outside them, given those of nsgd."""
    return {"sgd": (1.0, 1.0), "bulk-sgd": (0.0, 1.0), "dom-sgd": (1.0, 0.0)}.get(method, (gamma, bulk_scale))


def make_optimizer(
    study: Study, method: Method, lr: float, params: Iterable[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer of a method."""
    if method == "sgd":
        return torch.optim.SGD(params, lr=lr, momentum=study.momentum)
    options = study.nsgd
    gamma, bulk_scale = factors(method, options.gamma, options.bulk_scale)
    return NSGD(
        params,
        lr=lr,
        momentum=study.momentum,
        k=options.k,
        gamma=gamma,
        refresh_every=options.refresh_every,
        overhead=options.overhead,
        decay=options.decay,
        which=options.which,
        bulk_scale=bulk_scale,
        solver=options.solver,
        warmup_steps=options.warmup_steps,
    )


def run_study(study: Study, out: Path, progress: Progress) -> None:
    """Run what is not finished yet, and write results.csv, summary.csv and the runs' metrics into a folder.

    Raises:
        ValueError: If the study cannot run, or the folder holds another study; nothing is written then.
    """
    study.check()
    config = yaml.safe_load(yaml.safe_dump(study.resolved()))
    packages = ("nsgd", "torch", "pytorch-lightning", "numpy", "scipy", "scikit-learn")
    claim_folder(out, {"config.yaml": config}, packages=packages)
    torch.set_num_threads(study.threads)
    done = 0

    def finished_run(folder: Path, method: Method, seed: int, lr: float) -> Rows:
        nonlocal done
        results = folder / "results.csv"
        if not results.exists():
            at = done
            rows = _run(study, method, seed, lr, folder, lambda step, loss: progress(folder.name, at + step, loss))
            write_csv(results, rows)  # last: a run without it is not finished
        done += study.steps
        progress(folder.name, done, None)
        return read_csv(results)

    rates = _learning_rates(study, out, finished_run)
    rows = [
        row
        for seed in range(study.seeds)
        for method in study.methods
        for row in finished_run(out / "runs" / f"{method}-{seed}", method, seed, rates[method])
    ]
    write_csv(out / "results.csv", rows)
    write_csv(out / "summary.csv", summarise(rows))


def total_runs(study: Study) -> int:
    """Runs of a study, those that tune included."""
    return len(study.methods) * (study.seeds + (len(GRID) * len(TUNING_SEEDS) if study.lr == "grid" else 0))


def _learning_rates(study: Study, out: Path, run: Callable[[Path, Method, int, float], Rows]) -> dict[Method, float]:
    if isinstance(study.lr, float | int):
        return dict.fromkeys(study.methods, float(study.lr))
    if study.lr == "tuned":
        tuned = TUNED.get((type(study.data).__name__, study.net, study.momentum), {})
        return {method: tuned.get(method, 0.1) for method in study.methods}
    rows: Rows = []
    for method in study.methods:
        for lr in GRID:
            found = [run(out / "tuning" / f"{method}-{lr}-{seed}", method, seed, lr) for seed in TUNING_SEEDS]
            losses = [float(row["val_loss"]) for result in found for row in result if row["read_out"] == "last"]
            rows.append({"method": method, "lr": lr, "val_loss": float(np.mean(losses)), "seeds": len(losses)})
    write_csv(out / "tuning.csv", rows)

    def loss(row: dict[str, Any]) -> float:
        return math.inf if math.isnan(row["val_loss"]) else row["val_loss"]

    return {m: min((r for r in rows if r["method"] == m), key=loss)["lr"] for m in study.methods}


def _run(
    study: Study, method: Method, seed: int, lr: float, folder: Path, progress: Callable[[int, float], None]
) -> Rows:
    """Train once; write metrics.csv and return one row for each read-out."""
    pl.seed_everything(seed, verbose=False)
    data = study.data
    module = Classifier(study.net, data.input_shape, data.num_classes)
    module.configure_optimizers = lambda: make_optimizer(study, method, lr, module.parameters())  # type: ignore[method-assign]
    for name in MEASUREMENTS:
        (folder / f"{name}.csv").unlink(missing_ok=True)  # of a run that was interrupted
    measurements = make_measurements(study.measure if seed == 0 else [], folder=folder)
    record, read_outs = RecordSteps(progress, measurements), ReadOuts()
    refresh = [] if method == "sgd" else [study.nsgd.callback()]
    with _quiet():
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=study.epochs,
            callbacks=[*measurements, *refresh, read_outs, record],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(module, datamodule=data)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "metrics.csv", record.rows)
    last = record.rows[-1]
    pixels = data.splits["train"].pixels[:_CALIBRATION]
    calibration = [data.normalise(part) for part in torch.split(pixels, data.batch_size)]
    train = data.splits["train"]
    scored = {**data.splits, "train": Images(train.pixels[:EVALUATED], train.labels[:EVALUATED])}
    rows = []
    for name in read_outs.available:
        with read_outs.applied(name, module, calibration):
            scores = {
                f"{split}_{measure}": value
                for split in ("train", "val", "test")
                for measure, value in _score(module, data, scored[split]).items()
            }
        counts = {name: last[name] for name in ("step", "gradients", "seconds", "refreshes", "hvps")}
        rows.append({"method": method, "seed": seed, "read_out": name, "lr": lr, **scores, **counts})
    return rows


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


@torch.no_grad()
def _score(module: Classifier, data: ImageData, images: Images) -> dict[str, float]:
    """Mean loss and accuracy on images as they are stored."""
    logits = torch.cat([module(data.normalise(part)) for part in torch.split(images.pixels, 500)])
    loss: Tensor = torch.nn.functional.cross_entropy(logits, images.labels)
    return {"loss": float(loss), "accuracy": float((logits.argmax(1) == images.labels).double().mean())}


def summarise(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """Means over seeds with 95 % t-intervals, and paired differences to SGD at the same read-out.

    Args:
        rows: One for each method, seed and read-out.

    Returns:
        One row for each read-out, measure and method: mean, half-width of its interval, n, and difference to SGD
        with half-width and p-value of the paired t-test, where SGD is among the methods and there are two seeds.
    """
    summary: Rows = []
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for read_out in dict.fromkeys(row["read_out"] for row in rows):
        for measure in ("test_accuracy", "val_accuracy", "train_loss"):
            values = {
                method: {
                    row["seed"]: float(row[measure])
                    for row in rows
                    if row["method"] == method and row["read_out"] == read_out
                }
                for method in methods
            }
            for method in methods:
                own = np.array(list(values[method].values()))
                mean, half = _interval(own)
                entry = {"read_out": read_out, "measure": measure, "method": method, "mean": mean, "half_width": half}
                entry |= {"n": len(own), "difference": math.nan, "difference_half_width": math.nan, "p": math.nan}
                if method != "sgd" and "sgd" in values:
                    paired = np.array([values[method][seed] - values["sgd"][seed] for seed in values["sgd"]])
                    difference, half = _interval(paired)
                    entry |= {"difference": difference, "difference_half_width": half, "p": _p_value(paired)}
                summary.append(entry)
    return summary


def _interval(values: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    n = len(values)
    if n < 2 or not np.isfinite(values).all():
        return float(values.mean()), math.nan
    return float(values.mean()), float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))


def _p_value(differences: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    if len(differences) < 2 or not np.isfinite(differences).all():
        return math.nan
    if np.ptp(differences) <= 1e-9 * np.abs(differences).max():  # no spread: the t-statistic is not defined
        return 1.0 if differences[0] == 0 else math.nan
    return float(stats.ttest_1samp(differences, 0.0).pvalue)
