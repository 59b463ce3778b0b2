"""What a study's folder holds, read for its report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lightning_modules.report.style import MethodStyle, method_styles
from lightning_modules.support.files import Rows
from lightning_modules.support.paired import Effect, paired_change
from lightning_modules.support.score import COSTS, TRAIN_LOSS, Measure, Score, failed_runs
from lightning_modules.support.study_folder import StudyFolder, run_name


@dataclass(frozen=True)
class Files:
    """A finished study; what it did not ask for is empty, and runs that died are missing.

    Attributes:
        folder: Where it lies.
        config: Its options.
        environment: Machine and packages.
        styles: How each method is called and drawn.
        settings: Hyperparameters that each method trained with.
        target: Value of the score in validation whose cost is compared.
        results: One row for each method, seed and read-out.
        times: Seconds of each run.
        summary: What :func:`lightning_modules.study.statistics.summarise` made of the results.
        metrics: Method to seed to steps; none in a folder that was kept without its runs.
        one_by_one: Methods of which some run took gradients of samples one by one.
        deaths: Names of the runs that died.
        tuning: One row for each trial.
        tuning_seed: Seed of the trials.
        lost_trials: What the trials that died trained with, one row each.
        sweep: One row for each method and learning rate; those that died have no loss.
        reached: What each run had cost at the target.
    """

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    styles: dict[str, MethodStyle]
    settings: dict[str, dict[str, float]]
    target: float | None
    results: Rows
    times: Rows
    summary: Rows
    metrics: dict[str, dict[int, Rows]]
    one_by_one: list[str]
    deaths: list[str]
    tuning: Rows
    tuning_seed: int | None
    lost_trials: Rows
    sweep: Rows
    reached: Rows

    @property
    def score(self) -> Score:
        """What is compared beside the training loss."""
        name = self.config["monitor"]
        shares = all(abs(row.get(name, 0.0)) <= 1 for row in (*self.results, *self.tuning, *self.sweep))
        return Score(name, self.config["mode"], shares=shares)

    @property
    def measures(self) -> list[Measure]:
        """What the runs are compared by, the endpoint first."""
        every = self.score.measures([entry["measure"] for entry in self.summary])
        return sorted(every, key=lambda measure: measure.column != self.config.get("endpoint", every[0].column))

    @property
    def endpoint(self) -> Measure:
        """What the study is judged by, in its last weights; of studies of before, which named none, the score."""
        return self.measures[0]

    @property
    def secondary(self) -> Measure | None:
        """What stands beside the endpoint: the training loss, or the score where that is the endpoint."""
        others = [m for m in self.measures[1:] if TRAIN_LOSS in (m, self.endpoint)]
        return others[0] if others else None

    def effect(self, measure: Measure) -> Effect:
        """What a measure was compared as."""
        effect: Effect = next(entry["effect"] for entry in self.entries(measure.column))
        return effect

    @property
    def criterion(self) -> Measure:
        """What settings are chosen by."""
        return self.score.criterion(next(iter(self.tuning or self.sweep or self.results), {}))

    @property
    def methods(self) -> list[str]:
        """In the order of the study."""
        return list(self.metrics)

    @property
    def base(self) -> str:
        """The first method, which the others are compared with."""
        return self.methods[0]

    @property
    def judged(self) -> list[str]:
        """The methods other than the first that damp the sharpest directions."""
        return [m for m in self.methods[1:] if self.styles[m].damps]

    @property
    def subjects(self) -> list[str]:
        """Whose result is the main one: the judged methods, or where there are none, all but the first."""
        return self.judged or self.methods[1:]

    def label(self, method: str) -> str:
        """How a method is called in print."""
        return self.styles[method].label

    def directions(self, method: str) -> dict[str, Any]:
        """Options of the directions of a method that has them."""
        tuned = {name: self.settings[method][name] for name in ("gamma", "k") if name in self.settings[method]}
        options = {**self.config["nsgd"], **tuned, **(self.styles[method].damping or {})}
        return {**options, "k": round(options["k"])}

    @cached_property
    def failed(self) -> dict[str, set[int]]:
        """Seeds of each method whose run failed."""
        return failed_runs(self.results, self.methods, range(self.config["seeds"]))

    def entries(self, measure: str) -> Rows:
        """Rows of the summary."""
        return [row for row in self.summary if row["measure"] == measure]

    def values(self, method: str, read_out: str, measure: Measure) -> dict[int, float]:
        """A measure by seed, of the runs that did not fail."""
        return {
            row["seed"]: float(row[measure.column])
            for row in self.results
            if (row["method"], row["read_out"]) == (method, read_out)
            and measure.column in row
            and row["seed"] not in self.failed[method]
        }

    def last(self, method: str) -> Rows:
        """Results of a method's last weights."""
        return [row for row in self.results if row["method"] == method and row["read_out"] == "last"]

    def cost(self, method: str) -> dict[str, float] | None:
        """Medians over the runs of a method: steps, gradients, seconds, refreshes, products, state of the optimizer."""
        rows = self.last(method)
        if not rows:
            return None
        names = ("step", "gradients", "refreshes", "hvps", "state")
        counts = {name: float(np.median([r[name] for r in rows])) for name in names if all(name in row for row in rows)}
        seconds = float(np.median([row["seconds"] for row in self.times if row["method"] == method]))
        return {**counts, "seconds": seconds}

    def seconds_differ(self, method: str) -> bool:
        """Whether its seconds to the target differ from the first method's in a 95 % interval of their ratio."""
        seconds: dict[str, dict[int, float]] = {method: {}, self.base: {}}
        for row in self.reached:
            if row["method"] in seconds and row["reached"]:
                seconds[row["method"]][row["seed"]] = row["seconds"]
        ratio = paired_change(seconds[method], seconds[self.base], "ratio").mean
        return not ratio.low <= 1 <= ratio.high

    def to_target(self, method: str) -> tuple[int, int, dict[str, float]]:
        """Number of a method's runs that reached the target, of all, and median costs, infinite where most did not."""
        rows = [row for row in self.reached if row["method"] == method]
        medians = {name: float(np.median([row[name] for row in rows])) for name in COSTS}
        return sum(row["reached"] for row in rows), len(rows), medians


def read_folder(path: Path) -> Files:
    """Read a finished study."""
    folder = StudyFolder(path)
    config, written, settled = (folder.document(name) for name in ("config", "methods", "settled"))
    methods = list(written) or config["methods"]
    results, tuning = folder.table("results"), folder.table("tuning")
    finished = {(row["method"], row["seed"]) for row in results}
    deaths = [row["run"] for row in folder.table("deaths")]
    seconds = {(row["method"], row["seed"]): row["seconds"] for row in folder.table("target-times")}
    reached = [{**row, "seconds": seconds[row["method"], row["seed"]]} for row in folder.table("target")]
    first_trial = run_name("tune", tuning[0]["method"], tuning[0]["trial"]) if tuning else ""
    return Files(
        folder=path,
        config=config,
        environment=folder.document("environment"),
        styles=method_styles(methods, written),
        settings=settled["settings"],
        target=settled["target"],
        results=results,
        times=folder.table("times"),
        summary=[_entry(row) for row in folder.table("summary")],
        metrics={
            method: {
                seed: folder.run(run_name("study", method, seed)).steps()
                for seed in range(config["seeds"])
                if (method, seed) in finished
            }
            for method in methods
        },
        one_by_one=[
            method
            for method in methods
            if any(folder.run(run_name("study", method, seed)).one_by_one for seed in range(config["seeds"]))
        ],
        deaths=deaths,
        tuning=tuning,
        tuning_seed=tuning[0].get("seed", folder.run(first_trial).settings().get("seed")) if tuning else None,
        lost_trials=_lost(folder, deaths, "tuning/"),
        sweep=folder.table("sweep") + [{**row, "train_loss": math.nan} for row in _lost(folder, deaths, "sweep/")],
        reached=reached,
    )


def _entry(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the summary; that of a study of before, with half-widths of differences, as they are now."""
    if "effect" in row:
        return dict(row)
    entry = {name: row[name] for name in ("read_out", "measure", "method", "mean", "n", "pairs", "p", "p_holm")}
    low, high = _ends(row["mean"], row["half_width"])
    change_low, change_high = _ends(row["difference"], row["difference_half_width"])
    return {
        **{**entry, "effect": "difference", "low": low, "high": high, "failed": 0, "change": row["difference"]},
        **{"change_low": change_low, "change_high": change_high, "seeds_to_show": math.nan},
    }


def _ends(value: float, half: float) -> tuple[float, float]:
    return (-math.inf, math.inf) if math.isnan(half) else (value - half, value + half)


def _lost(folder: StudyFolder, deaths: list[str], stage: str) -> Rows:
    """What the runs of a stage that died trained with, as far as it is known."""
    settings = (folder.run(name).settings() for name in deaths if name.startswith(stage))
    return [dict(run) for run in settings if run]
