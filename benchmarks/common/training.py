"""Training runs that benchmarks compare: in turns, and kept in a file from which they resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy

from common import Data, small_cnn
from lightning_modules.models.nets.resnet import resnet
from lightning_modules.support.files import read_csv, write_csv
from nsgd import NSGD, sample_losses

SAMPLES = 32  # of the running batch, one by one, give the directions where the solver is "gradients"
TUNING_SEEDS = (1000, 1001, 1002)

Row = dict[str, Any]


class Optimizer(Protocol):
    """What a training loop needs of an optimizer, or of several that act as one."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self) -> None:
        """Forget the last gradients."""

    def step(self) -> Any:
        """Take a step."""


Make = Callable[[Iterable[Tensor], float], Optimizer]  # parameters, learning rate


@dataclass(frozen=True)
class Method:
    """An optimizer, and what the training loop does for it."""

    make: Make
    start: float = 0.1  # the rate that tuning tries first
    clip: float = math.inf  # norm to which the gradient is clipped
    micro_batches: int = 1  # passes that make up a batch


RESNET = "ResNet-32 without BatchNorm"
NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {  # of channels and side
    "CNN": small_cnn,
    RESNET: lambda channels, side: resnet((channels, side, side), 10, depth=32, batch_norm=False),
}


@dataclass(frozen=True)
class Case:
    """One network and batch size, how long it is trained, and how often it is looked at."""

    network: str
    batch: int
    epochs: int
    evaluations: int = 30  # at least, evenly spaced
    images: int = 12_000  # at most
    side: int = 32  # pixels, at most
    schedule: Literal["constant", "cosine"] = "constant"

    @property
    def name(self) -> str:
        """What it is called in files and tables."""
        size = f" at {self.side} px" if self.side < 32 else ""
        return f"{self.network}{size}, batch {self.batch:,}" + (", cosine" if self.schedule == "cosine" else "")

    def cut(self, data: Data) -> Data:
        """The images of this case, in its size."""
        side = min(self.side, data.images.shape[2])
        small, val = (adaptive_avg_pool2d(x, side) for x in (data.images[: self.images], data.val_images))
        return Data(small, data.labels[: self.images], val, data.val_labels)

    def factor(self, done: float) -> float:
        """What the schedule makes of the learning rate after a part of the run."""
        return 1.0 if self.schedule == "constant" else (1 + math.cos(math.pi * done)) / 2


class Jumps:
    """Counts jumps of the loss: its mean over the last 3 or so batches above 1.3 times that over the last 20 or so."""

    def __init__(self) -> None:
        self.count = 0
        self._fast = self._slow = math.nan
        self._is_up = False

    def note(self, loss: float) -> None:
        """Take in the loss of a step; a NaN is a jump as well."""
        if math.isnan(self._slow):
            self._fast = self._slow = loss
        self._fast += 0.3 * (loss - self._fast)
        up = not self._fast <= 1.3 * self._slow
        self.count += up and not self._is_up
        self._is_up = up
        self._slow += 0.05 * (loss - self._slow)


def train(data: Data, case: Case, method: Method, lr: float, seed: int) -> Iterator[Row]:
    """One run, a row for each evaluation; it waits until the next is asked for, and ends where the loss is not finite.

    A tuning run is evaluated three times only, at its end. Images are channels last, for two thirds of the time.
    """
    data = case.cut(data)
    torch.manual_seed(seed)
    model = NETWORKS[case.network](data.images.shape[1], data.images.shape[2])
    optimizer = method.make(model.parameters(), lr)
    rates = [group["lr"] for group in optimizer.param_groups]
    order = torch.Generator().manual_seed(seed)
    batches = len(data.labels) // case.batch
    steps = case.epochs * batches
    every = max(1, steps // case.evaluations)
    first = steps - 3 * every if seed in TUNING_SEEDS else 0
    spent, jumps, accuracy = 0.0, Jumps(), 0.0

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model(x), y)

    for step in range(steps):
        if step % batches == 0:
            shuffled = torch.randperm(len(data.labels), generator=order)
        chosen = shuffled[step % batches * case.batch :][: case.batch]
        x, y = data.images[chosen].contiguous(memory_format=torch.channels_last), data.labels[chosen]
        started = time.process_time()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * case.factor(step / steps)
        optimizer.zero_grad()
        total = torch.zeros(())
        for part, labels in zip(x.chunk(method.micro_batches), y.chunk(method.micro_batches), strict=True):
            loss = loss_of(part, labels) * (len(part) / len(x))
            if isinstance(optimizer, NSGD) and optimizer.options.solver == "gradients":
                groups = sample_losses(loss_of, x[:SAMPLES], y[:SAMPLES], module=model)
                optimizer.backward(loss, curvature=groups, batch_fraction=SAMPLES / case.batch)
            else:
                loss.backward()
            total += loss.detach()
        if method.clip < math.inf:
            nn.utils.clip_grad_norm_(model.parameters(), method.clip)
        optimizer.step()
        spent += time.process_time() - started
        jumps.note(float(total))
        extra = optimizer.cost_gradients if isinstance(optimizer, NSGD) else 0.0
        row = {"step": step + 1, "gradients": step + 1 + extra, "seconds": spent, "jumps": jumps.count}
        if not total.isfinite():
            yield {**row, "train_loss": math.inf, "val_accuracy": accuracy}
            return
        if (steps - step - 1) % every == 0 and step >= first:
            measured = evaluate(model, data)
            accuracy = measured["val_accuracy"]
            yield {**row, **measured}


def evaluate(model: nn.Module, data: Data, images: int = 2048) -> dict[str, float]:
    """Training loss on a fixed part of the training images, and validation accuracy."""
    with torch.no_grad():
        loss = cross_entropy(model(data.images[:images]), data.labels[:images])
        accuracy = (model(data.val_images).argmax(1) == data.val_labels).float().mean()
    return {"train_loss": float(loss) if loss.isfinite() else math.inf, "val_accuracy": float(accuracy)}


def final_loss(rows: list[Row]) -> float:
    """Mean of the last three evaluations: one alone hangs on the last batch."""
    return mean(float(row["train_loss"]) for row in rows[-3:])


def by_seed(rows: list[Row], case: str, method: str) -> dict[int, list[Row]]:
    """The runs of a method, without those that its rate was tuned on."""
    own = [row for row in rows if (row["case"], row["method"]) == (case, method) and row["seed"] not in TUNING_SEEDS]
    return {seed: [row for row in own if row["seed"] == seed] for seed in sorted({row["seed"] for row in own})}


class Runs:
    """Finished runs, kept in a file so that an interrupted benchmark goes on where it stopped."""

    def __init__(self, path: Path | None, data: Data, methods: Mapping[str, Method]) -> None:
        self.path, self.data, self.methods = path, data, methods
        self.rows: list[Row] = read_csv(path) if path is not None and path.exists() else []

    def get(self, case: Case, rates: Mapping[str, float], seed: int) -> dict[str, list[Row]]:
        """The rows of a run of each method. Missing ones are trained now, in turns, so that their seconds compare."""
        keys = {m: {"case": case.name, "method": m, "lr": lr, "seed": seed} for m, lr in rates.items()}
        found = {m: [r for r in self.rows if all(r[n] == v for n, v in key.items())] for m, key in keys.items()}
        missing = [m for m in rates if not found[m]]
        running = {m: train(self.data, case, self.methods[m], rates[m], seed) for m in missing}
        while running:
            for m, rows in list(running.items()):
                row = next(rows, None)
                if row is None:
                    del running[m]
                else:
                    found[m].append({**keys[m], **row})
        for m in missing:
            if seed not in TUNING_SEEDS:  # a rate that is no longer the best of the grid has had its run
                self.rows = [r for r in self.rows if (r["case"], r["method"], r["seed"]) != (case.name, m, seed)]
            self.rows += found[m]
            print(
                *keys[m].values(),
                f"final loss {final_loss(found[m]):.3f}",
                f"{found[m][-1]['seconds']:.0f} s",
                flush=True,
            )
        if missing and self.path is not None:
            write_csv(self.path, self.rows)
        return found

    def tuned(self, case: Case, method: str) -> float:
        """The learning rate with the least final training loss, on a grid in steps of the square root of 2.

        On the first tuning seed the best is enclosed in steps of 2, then of the square root of 2. The mean over all
        tuning seeds decides between it and its neighbours, and so on to theirs until the best has one on either side.
        A run that diverged counts as infinite.
        """

        def rate(place: int) -> float:
            return float(f"{self.methods[method].start * 2 ** (place / 2):.3g}")

        def loss(place: int, seeds: tuple[int, ...]) -> float:
            return mean(final_loss(self.get(case, {method: rate(place)}, seed)[method]) for seed in seeds)

        best = 0
        for step, seeds in ((2, TUNING_SEEDS[:1]), (1, TUNING_SEEDS[:1]), (1, TUNING_SEEDS)):
            best = enclosed(lambda place, seeds=seeds: loss(place, seeds), best, step)
        return rate(best)


def enclosed(function: Callable[[int], float], start: int, step: int) -> int:
    """A place where a function is no larger than one step to either side; the lesser one where two are alike."""
    values: dict[int, float] = {}
    best = start
    while missing := [place for place in (best, best - step, best + step) if place not in values]:
        values |= {place: function(place) for place in missing}
        best = min(values, key=lambda place: (values[place], place))
    return best
