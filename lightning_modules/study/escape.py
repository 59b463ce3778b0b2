"""The study behind ``nsgd escape``: how long SGD takes to leave a minimum, where it stays, and what that costs.

Walkers run SGD on a potential with two minima (Dai & Zhu 2018, arXiv 1812.00542); every number that is measured stands
beside what the diffusion predicts. Then the same walkers with the step along one direction scaled, as NSGD scales it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_modules.support.files import Rows, read_csv, write_csv
from lightning_modules.support.imported import imported
from lightning_modules.support.in_use import held
from lightning_modules.support.progress import Update
from lightning_modules.support.study_folder import Document, StudyFolder
from nsgd.trajectory.escape import temperature, walkers
from nsgd.trajectory.escape.landscape import BUILT_IN, Landscape, Map, built_in_landscape, landscape_between, with_noise
from nsgd.trajectory.escape.theory import predicted_stay, predicted_steps

_MOST = 2**31 - 1  # of walkers, of steps, of a seed


@dataclass(frozen=True)
class EscapeStudy:
    """Let SGD escape from a minimum to the other one, and compare with what the diffusion predicts.

    Args:
        potential: double-well; channel (the double well along a valley with walls across, two-dimensional); or
            module:name, the import path of a function of torch tensors, points (n, d) to losses (n,).
        start: With a potential of your own: a point near the minimum that walkers leave.
        goal: With a potential of your own: a point near the minimum that they reach.
        saddle: With a potential of your own: a point near the saddle; null for the highest one straight between.
        barrier: Height of the double well's saddle above its minima.
        skew: How much sharper its left minimum is, from 0 to below 1.
        walls: Curvature across the channel, at its saddle.
        lr: Learning rates.
        batch_sizes: Batch sizes at the first rate; at the others they are scaled in proportion, so that the
            temperatures are the same.
        momentum: Of SGD, from 0 to below 1: the temperature is 1 / (1 - momentum) times as high, and walkers have
            inertia.
        noise: Variance of the gradient of one sample, along each coordinate.
        noise_follows: What that variance is in proportion to: nothing (constant), the loss above the deeper minimum, in
            barriers, or the curvature, in that of the start. It decides the claims: see the predictions of each.
        noise_floor: Where it follows something, the share of it that is there everywhere, above 0.
        gammas: Factors on the step along one direction, at the smallest rate.
        gamma_batch_size: Batch size with them.
        walkers: Walkers of each run.
        steps: Most steps of each run; walkers that have not arrived by then count as if the later rate went on.
        seed: Of the noise.
    """

    potential: str = "double-well"
    start: list[float] | None = None
    goal: list[float] | None = None
    saddle: list[float] | None = None
    barrier: float = 1.0
    skew: float = 0.3
    walls: float = 40.0
    lr: list[float] = field(default_factory=lambda: [0.02, 0.01])
    batch_sizes: list[float] = field(default_factory=lambda: [40.0, 46.0, 52.0, 60.0])
    momentum: float = 0.0
    noise: float = 1000.0
    noise_follows: Literal["constant", "loss", "curvature"] = "constant"
    noise_floor: float = 0.1
    gammas: list[float] = field(default_factory=lambda: [1.0, 0.75, 0.5])
    gamma_batch_size: float = 10.0
    walkers: int = 10_000
    steps: int = 5_000
    seed: int = 0

    def check(self) -> None:
        """Raise a ValueError for numbers out of range."""
        for name, values in (("lr", self.lr), ("batch_sizes", self.batch_sizes), ("gammas", self.gammas)):
            if not values or len(set(values)) < len(values) or not all(0 < value < math.inf for value in values):
                raise ValueError(f"expected {name} to be different numbers above 0, got {values}")
        for name, value in (("noise", self.noise), ("gamma_batch_size", self.gamma_batch_size)):
            if not 0 < value < math.inf:
                raise ValueError(f"expected {name} above 0, got {value}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"expected momentum of at least 0 and below 1, got {self.momentum:g}")
        if self.momentum and self.noise_follows != "constant":
            raise ValueError(
                f"expected noise that is the same everywhere with momentum, got noise_follows {self.noise_follows}, "
                "for which no prediction is known; leave out one of the two"
            )
        if not 0 < self.noise_floor <= 1:
            raise ValueError(f"expected noise_floor above 0 and at most 1, got {self.noise_floor:g}")
        for name, count, least in (("walkers", self.walkers, 2), ("steps", self.steps, 1), ("seed", self.seed, 0)):
            if count < least:
                raise ValueError(f"expected {name} of at least {least}, got {count}")
            if count > _MOST:
                raise ValueError(f"expected {name} of at most {_MOST:,}, got {count:.6g}")

    def landscape(self) -> Landscape:
        """The potential with its minima and its saddle."""
        if self.potential not in BUILT_IN:
            return self.with_noise(_own_landscape(self.potential, self.start, self.goal, self.saddle))
        for option in ("start", "goal", "saddle"):
            if getattr(self, option) is not None:
                raise ValueError(f"expected --{option} only with a potential of your own, got it with {self.potential}")
        return self.built_in(self.potential)

    def built_in(self, name: str) -> Landscape:
        """The built-in one of a name, with the study's numbers."""
        return self.with_noise(built_in_landscape(name, barrier=self.barrier, skew=self.skew, walls=self.walls))

    def with_noise(self, landscape: Landscape) -> Landscape:
        """A landscape with the study's noise on it."""
        return with_noise(landscape, self.noise_follows, floor=self.noise_floor)

    def sgd(self, lr: float, batch_size: float) -> dict[str, float]:
        """Options of SGD."""
        return {"lr": lr, "noise": self.noise, "batch_size": batch_size, "momentum": self.momentum}


def _own_landscape(
    path: str, start: list[float] | None, goal: list[float] | None, saddle: list[float] | None
) -> Landscape:
    """A potential of the user's, by its import path module:name."""
    potential: Map = imported(path, option="potential", known=", ".join(BUILT_IN))
    if start is None or goal is None or not 0 < len(start) == len(goal):
        raise ValueError(
            "expected --start and --goal with a potential of your own, points of one dimension near its two minima, "
            f"got {start} and {goal}"
        )
    if saddle is not None and len(saddle) != len(start):
        raise ValueError(f"expected --saddle to have {len(start)} coordinates, got {saddle}")
    left, right = torch.tensor([start, goal], dtype=torch.float64, device="cpu")
    near = None if saddle is None else torch.tensor(saddle, dtype=torch.float64, device="cpu")
    return landscape_between(potential, left, right, near, name=path)


def run_escape(study: EscapeStudy, out: Path, progress: Update) -> None:
    """Run what is not finished yet, and write escape.csv, potential.csv, config.yaml and landscape.yaml into a folder.

    Raises:
        ValueError: If the study cannot run, or the folder holds another study, and nothing is written then; if another
            process makes this study there; or if walkers diverge.
    """
    study.check()
    landscape = study.landscape()
    dampings = _dampings(study, landscape)
    _check_rates(study, landscape, dampings)
    runs = _runs(study, landscape, dampings)
    documents: dict[Document, dict[str, Any]] = {
        "config": asdict(study),
        "landscape": _described(landscape, dampings),
    }
    # What folders of before do not say was so.
    unsaid: dict[str, dict[str, Any]] = {
        "config": {"momentum": 0.0, "noise_follows": "constant", "noise_floor": study.noise_floor}
    }
    StudyFolder(out).claim(documents, unsaid=unsaid, packages=("nsgd", "torch", "numpy", "scipy"))
    rows: Rows = []
    with held(out):
        for i, (name, run) in enumerate(runs):
            path = out / "runs" / f"{name.replace(' ', '-')}.csv"

            def update(step: int, said: str, title: str = f"run {i + 1} of {len(runs)}: {name}", done: int = i) -> None:
                progress(title, done * study.steps + step, len(runs) * study.steps, said)

            update(0, "")
            if not path.exists():
                write_csv(path, run(int(np.random.SeedSequence([study.seed, i]).generate_state(1)[0]), update))
            update(study.steps, "")
            rows += read_csv(path)
        write_csv(out / "potential.csv", _way(landscape))
        write_csv(out / "escape.csv", rows)


@dataclass(frozen=True)
class _Damping:
    """A direction along which the step is scaled."""

    name: str
    landscape: Landscape
    direction: Tensor  # (d,)

    def matrix(self, gamma: float) -> Tensor:
        """What multiplies the step, (d, d)."""
        return (
            torch.eye(len(self.direction), device="cpu")
            - (1 - gamma) * torch.outer(self.direction, self.direction).float()
        )


def _dampings(study: EscapeStudy, landscape: Landscape) -> list[_Damping]:
    """The way out, and the sharpest direction where that is another one; beside a well alone, that of a channel."""
    dampings = [_Damping("way out", landscape, landscape.way_out)]
    wide = study.built_in("channel") if study.potential == "double-well" else landscape
    sharpest = torch.linalg.eigh(wide.hessian(wide.start)).eigenvectors[:, -1]
    if abs(float(sharpest @ wide.way_out)) < 0.99:
        dampings.append(_Damping("sharpest", wide, sharpest))
    return dampings


def _described(landscape: Landscape, dampings: list[_Damping]) -> dict[str, Any]:
    """What the predictions follow from, as plain numbers."""

    def rounded(values: Any) -> Any:
        return [rounded(v) for v in values] if isinstance(values, list) else float(f"{values:.6g}")

    points = {"start": landscape.start, "saddle": landscape.saddle, "goal": landscape.goal}
    return {
        "names": dict(zip(("start", "goal"), landscape.names, strict=True)),
        "barrier": rounded(landscape.barrier),
        **({} if landscape.spread is None else {"effective_barrier": rounded(landscape.effective_barrier)}),
        "points": {name: rounded(point.tolist()) for name, point in points.items()},
        "curvatures": {name: rounded(landscape.curvatures(point).tolist()) for name, point in points.items()},
        "damped": {  # name -> curvature along it, at the start
            damping.name: rounded(
                float(damping.direction @ damping.landscape.hessian(damping.landscape.start) @ damping.direction)
            )
            for damping in dampings
        },
    }


def _way(landscape: Landscape) -> Rows:
    """The potential above the start, along the straight way from the start over the saddle to the goal and beyond."""
    ends = [float((point - landscape.saddle).norm()) for point in (landscape.start, landscape.goal)]
    rows = []
    for side, point, distance in zip((-1, 1), (landscape.start, landscape.goal), ends, strict=True):
        for share in np.linspace(0, _BEYOND, _POINTS)[side < 0 :]:
            value = landscape.value(torch.lerp(landscape.saddle, point, float(share)))
            rows.append({"distance": side * float(share) * distance, "loss": value - landscape.value(landscape.start)})
    return sorted(rows, key=lambda row: row["distance"])


def _check_rates(study: EscapeStudy, landscape: Landscape, dampings: list[_Damping]) -> None:
    """Raise a ValueError if SGD is not stable, or too cold for any walker to arrive."""
    fastest = max(study.lr) * max(1.0, *study.gammas)
    steepest = max(landscape.steepest, *(damping.landscape.steepest for damping in dampings))
    limit = 2 * (1 + study.momentum) / steepest
    if fastest >= limit:
        two = "2 (1 + momentum)" if study.momentum else "2"
        raise ValueError(f"expected lr, times gamma above 1, below {two} / curvature = {limit:.3g}, got {fastest:g}")
    heats = [temperature(**study.sgd(study.lr[0], size)) for size in study.batch_sizes]
    damped = temperature(**study.sgd(min(study.lr), study.gamma_batch_size))
    coldest = min([*heats, damped, damped * min(study.gammas)])
    barrier = landscape.barrier if math.isnan(landscape.effective_barrier) else landscape.effective_barrier
    if barrier > 100 * coldest:
        raise ValueError(
            f"expected a barrier of at most 100 temperatures, got {barrier / coldest:.3g}: no walker would "
            "pass it; choose smaller --batch_sizes or --gamma_batch_size, larger --gammas or more --noise"
        )


_BEYOND, _POINTS = 1.3, 80  # how far the way goes on, in distances from saddle to minimum, and points on each side
_Run = Callable[[int, walkers.Update], Rows]  # seed, update


def _runs(study: EscapeStudy, landscape: Landscape, dampings: list[_Damping]) -> list[tuple[str, _Run]]:
    """Every run under its name; what is predicted of it is known before it."""
    runs: list[tuple[str, _Run]] = []
    for lr, base in product(study.lr, study.batch_sizes):
        sgd = study.sgd(lr, base * lr / study.lr[0])
        runs.append((f"escape lr {lr:g} batch {sgd['batch_size']:g}", _escape(study, landscape, sgd)))
    for size in study.batch_sizes:
        sgd = study.sgd(study.lr[0], size)
        runs.append((f"stay lr {study.lr[0]:g} batch {size:g}", _stay(study, landscape, sgd)))
    sgd = study.sgd(min(study.lr), study.gamma_batch_size)
    for damping, gamma in product(dampings, study.gammas):
        run = _escape(study, damping.landscape, sgd, damping, gamma)
        runs.append((f"{damping.name} damped gamma {gamma:g}", run))
    return runs


def _escape(
    study: EscapeStudy,
    landscape: Landscape,
    sgd: dict[str, float],
    damping: _Damping | None = None,
    gamma: float = 1.0,
) -> _Run:
    name = "" if damping is None else damping.name
    scale = None if damping is None else damping.matrix(gamma)
    predicted = predicted_steps(landscape, sgd, **{"out" if name == "way out" else "across": gamma})
    labels = {"origin": landscape.names[0], "damped": name, "gamma": gamma}
    setting = _setting("escape" if damping is None else "damped escape", sgd)

    def run(seed: int, update: walkers.Update) -> Rows:
        options = {"walkers": study.walkers, "steps": study.steps, "seed": seed}
        found = walkers.escape(landscape, sgd, update=update, scale=scale, **options)
        return [{**setting, **labels, **found, **_columns(predicted)}]

    return run


def _stay(study: EscapeStudy, landscape: Landscape, sgd: dict[str, float]) -> _Run:
    predicted = predicted_stay(landscape, sgd)

    def run(seed: int, update: walkers.Update) -> Rows:
        found = walkers.stay(landscape, sgd, walkers=study.walkers, steps=study.steps, seed=seed, update=update)
        return [{**_setting(row["quantity"], sgd), **row, **_columns(predicted[row["quantity"]])} for row in found]

    return run


def _setting(quantity: str, sgd: dict[str, float]) -> dict[str, Any]:
    return {"quantity": quantity, "lr": sgd["lr"], "batch_size": sgd["batch_size"], "temperature": temperature(**sgd)}


def _columns(predicted: tuple[float, float]) -> dict[str, float]:
    return dict(zip(("exact", "leading"), predicted, strict=True))
