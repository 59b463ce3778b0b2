"""Tiny studies of digits, and what they leave behind."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lightning_modules import Classifier, Digits
from lightning_modules.study.compare import run_study
from lightning_modules.study.methods import NSGDOptions
from lightning_modules.study.options import Study
from lightning_modules.support.score import Score

ACCURACY = Score("val_accuracy", "max")
MEASURES = ACCURACY.measures(["test_accuracy", "val_accuracy", "train_loss"])  # of our classifier
STEPS = 8  # of one run of the study below: 240 training images in batches of 50, two epochs, remainders left out
OPTIONS = NSGDOptions(k=2, refresh_every=3, samples=16, solver="gradients")


def study(**options: Any) -> Study:
    data = Digits(batch_size=50, limit=300)  # 240 training images, 4 steps an epoch
    return replace(Study(data=data, methods=["sgd", "nsgd"], seeds=2, epochs=2, lr=0.2, nsgd=OPTIONS), **options)


def plain_start(seed: int = 0) -> tuple[nn.Module, Digits]:
    """The network and the data that a run of the study begins with, without the study."""
    torch.manual_seed(seed)
    data = Digits(batch_size=50, limit=300)
    return Classifier().net, data


def plain_steps(
    net: nn.Module,
    data: Digits,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int = STEPS,
    rate: Callable[[int], float] | None = None,
) -> Iterator[float]:
    """A training loop on the batches of a run, from torch alone; yields each step's loss when the step is done."""
    sampler, train = data.train_dataloader().sampler, data.splits["train"]

    def batches() -> Iterator[Any]:
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            yield from sampler

    for step, indices in enumerate(itertools.islice(batches(), steps)):
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(data.normalise(train.pixels[indices])), train.labels[indices])
        loss.backward()
        optimizer.step()
        yield loss.item()


def on_a_plateau(losses_of: list[float], patience: int) -> list[float]:
    """Factors on the rate after each validation, by the words of the schedule."""
    factors, factor, best, waited = [], 1.0, math.inf, 0
    for loss in losses_of:
        waited = 0 if loss < best else waited + 1
        best = loss if waited == 0 else best
        if waited == patience:
            factor, waited = factor / 10, 0
        factors.append(factor)
    return factors


def silent(*_: Any) -> None:
    pass


def finished(folder: Path, **options: Any) -> Path:
    run_study(study(**options), folder, silent)
    return folder


def without_seconds(folder: Path) -> dict[str, Any]:
    """Every file of a study but its environment; of tables that have seconds, all but these."""
    texts = [path for path in sorted(folder.rglob("*.*")) if path.suffix != ".csv" and path.name != "environment.yaml"]
    found: dict[str, Any] = {str(path.relative_to(folder)): path.read_bytes() for path in texts}
    for path in sorted(folder.rglob("*.csv")):
        with path.open(newline="") as file:
            rows = [{name: v for name, v in row.items() if name != "seconds"} for row in csv.DictReader(file)]
        timed = path.name in ("metrics.csv", "times.csv", "target-times.csv")
        found[str(path.relative_to(folder))] = rows if timed else path.read_bytes()
    return found
