"""Tiny studies of digits, and what they leave behind."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_modules import Digits
from lightning_modules.study.compare import run_study
from lightning_modules.study.methods import NSGDOptions
from lightning_modules.study.options import Study
from lightning_modules.support.score import Score

ACCURACY = Score("val_accuracy", "max")
MEASURES = ("test_accuracy", "val_accuracy", "train_loss")  # of our classifier
STEPS = 8  # of one run of the study below: 240 training images in batches of 50, two epochs, remainders left out
OPTIONS = NSGDOptions(k=2, refresh_every=3, samples=16, solver="gradients")


def study(**options: Any) -> Study:
    data = Digits(batch_size=50, limit=300)  # 240 training images, 4 steps an epoch
    return replace(Study(data=data, methods=["sgd", "nsgd"], seeds=2, epochs=2, lr=0.2, nsgd=OPTIONS), **options)


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
