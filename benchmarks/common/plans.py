"""What benchmarks/cifar10.py has kept of the studies of its plans."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_modules.report.study.curves import Point
from lightning_modules.report.study.files import Files, read_folder
from lightning_modules.report.style import method_styles
from lightning_modules.support.files import Rows
from lightning_modules.support.run_folder import rows
from lightning_modules.support.study_folder import StudyFolder


@dataclass(frozen=True)
class Kept:
    """A study of a plan, finished or not, as benchmarks/results/cifar10 has it.

    Attributes:
        folder: Where it lies, at plan/study.
    """

    folder: Path

    @property
    def name(self) -> str:
        """Plan and study."""
        return f"{self.plan}/{self.folder.name}"

    @property
    def plan(self) -> str:
        """Name of the plan."""
        return self.folder.parent.name

    @property
    def drawing(self) -> Path:
        """Where its figure lies."""
        return self.folder / "curves.svg"

    @property
    def finished(self) -> bool:
        """Whether it has its results."""
        return (self.folder / "results.csv").exists()

    @property
    def swept_alone(self) -> bool:
        """Whether it is about the rates that were swept, and its one seed tells nothing besides."""
        return self.finished and bool(self.files.sweep) and self.files.config["seeds"] == 1

    @cached_property
    def runs(self) -> Rows:
        """Of a study that is not finished, what its runs ended with so far; none where none has."""
        return rows(self.folder / "partial.csv")

    @cached_property
    def paths(self) -> Rows:
        """What was measured along the first run of each method; none where nothing was."""
        return rows(self.folder / "paths.csv")

    @cached_property
    def sharpness(self) -> dict[str, Rows]:
        """By method, in their order, the largest eigenvalues that were measured at a rate with a limit, by steps."""
        measured = [row for row in self.paths if row.get("lambda_1") is not None and row.get("limit")]
        ordered = sorted(measured, key=lambda row: row["step"])
        found = {method: [row for row in ordered if row["method"] == method] for method in self.files.methods}
        return {method: rows for method, rows in found.items() if rows}

    @cached_property
    def files(self) -> Files:
        """What the report of a study goes by; of one that is not finished, its trials alone."""
        if self.finished:
            return read_folder(self.folder)
        folder = StudyFolder(self.folder)
        config, written, environment = (folder.document(name) for name in ("config", "methods", "environment"))
        trials = [row for row in self.runs if row["run"].startswith("tuning/")]
        return Files(
            folder=self.folder,
            config=config,
            environment=environment,
            styles=method_styles(written, written),
            settings={},
            target=None,
            results=[],
            times=[],
            summary=[],
            metrics={method: {} for method in written},
            one_by_one=[],
            deaths=[],
            tuning=trials,
            tuning_seed=None,
            lost_trials=[],
            sweep=[],
            reached=[],
        )

    @property
    def has_figure(self) -> bool:
        """Whether there are losses by epoch, or before the end trials, to draw."""
        return (self.folder / "curves.csv").exists() if self.finished else bool(self.files.tuning)

    @cached_property
    def entries(self) -> dict[tuple[str, str], dict[str, Any]]:
        """The summary of the last weights, by measure and method."""
        return {(row["measure"], row["method"]): row for row in self.files.summary if row["read_out"] == "last"}

    @property
    def chance(self) -> float:
        """The loss of ten equal guesses; that of a language is not known here."""
        return math.inf if self.files.config["data"]["class_path"].endswith("Characters") else math.log(10)

    def trials_of(self, method: str) -> Rows:
        """What the trials of a method ended with so far."""
        return [row for row in self.files.tuning if row["method"] == method]

    def best_trial(self, method: str) -> dict[str, Any]:
        """The trial of the lowest validation loss; empty where none is finite."""
        finite = [row for row in self.trials_of(method) if math.isfinite(row["val_loss"])]
        return min(finite, key=lambda row: row["val_loss"], default={})

    def curves(self, method: str) -> dict[int, list[Point]]:
        """The mean loss of each epoch by seed, from its table of them."""
        runs: dict[int, list[Point]] = {}
        for row in self.epochs(method):
            runs.setdefault(row["seed"], []).append(({"epoch": row["epoch"] + 1}, row["loss"]))
        return runs

    def epochs(self, method: str) -> Rows:
        """A row for each epoch of each seed, from 0 on, with the mean loss and the validation."""
        return [row for row in self._curves if row["method"] == method]

    @cached_property
    def _curves(self) -> Rows:
        return rows(self.folder / "curves.csv")


def kept_in(results: Path) -> list[Kept]:
    """The studies that were kept, by plan and name.

    Args:
        results: The folder of plans, each with a folder for each of its studies.
    """
    return [Kept(path.parent) for path in sorted(results.glob("*/*/config.yaml"))]
