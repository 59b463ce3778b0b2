"""Training runs that benchmarks compare: in turns, and kept in a file from which they resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy

from common import Data, small_cnn
from lightning_modules.nets import resnet
from lightning_modules.rows import read_csv, write_csv
from nsgd import NSGD, sample_losses

SAMPLES = 32  # of the running batch, one by one, give the directions where the solver is "gradients"
TUNING_SEEDS = (1000, 1001)

Make = Callable[[Iterable[Tensor], float], torch.optim.Optimizer]  # parameters, learning rate
Row = dict[str, Any]


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
    evaluations: int  # in an epoch
    grid: tuple[float, ...]  # of learning rates
    images: int = 12_000  # at most
    side: int = 32  # pixels, at most
    finalists: int = 1  # best rates that are tried on a second seed: one seed may like a rate that others do not bear

    @property
    def name(self) -> str:
        """What it is called in files and tables."""
        return f"{self.network}, batch {self.batch:,}"

    def cut(self, data: Data) -> Data:
        """The images of this case, in its size."""
        side = min(self.side, data.images.shape[2])
        small, val = (adaptive_avg_pool2d(x, side) for x in (data.images[: self.images], data.val_images))
        return Data(small, data.labels[: self.images], val, data.val_labels)


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


def train(data: Data, case: Case, make: Make, lr: float, seed: int) -> Iterator[Row]:
    """One run, a row for each evaluation; it waits until the next is asked for."""
    data = case.cut(data)
    torch.manual_seed(seed)
    model = NETWORKS[case.network](data.images.shape[1], data.images.shape[2])
    optimizer = make(model.parameters(), lr)
    order = torch.Generator().manual_seed(seed)
    batches = len(data.labels) // case.batch
    every = max(1, batches // case.evaluations)
    step, spent, jumps = 0, 0.0, Jumps()

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model(x), y)

    for _ in range(case.epochs):
        shuffled = torch.randperm(len(data.labels), generator=order)
        for i in range(batches):
            chosen = shuffled[i * case.batch : (i + 1) * case.batch]
            x, y = data.images[chosen], data.labels[chosen]
            started = time.process_time()
            optimizer.zero_grad()
            loss = loss_of(x, y)
            if isinstance(optimizer, NSGD) and optimizer.options.solver == "gradients":
                groups = sample_losses(loss_of, x[:SAMPLES], y[:SAMPLES], module=model)
                optimizer.backward(loss, curvature=groups, batch_fraction=SAMPLES / case.batch)
            else:
                loss.backward()
            optimizer.step()
            spent += time.process_time() - started
            step += 1
            jumps.note(float(loss.detach()))
            if (i + 1) % every == 0:
                extra = optimizer.cost_gradients if isinstance(optimizer, NSGD) else 0.0
                row = {"step": step, "gradients": step + extra, "seconds": spent, "jumps": jumps.count}
                yield {**row, **evaluate(model, data)}


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
    """The runs of a method, without the one that its rate was tuned on."""
    own = [row for row in rows if (row["case"], row["method"]) == (case, method) and row["seed"] not in TUNING_SEEDS]
    return {seed: [row for row in own if row["seed"] == seed] for seed in sorted({row["seed"] for row in own})}


class Runs:
    """Finished runs, kept in a file so that an interrupted benchmark goes on where it stopped."""

    def __init__(self, path: Path | None, data: Data, methods: Mapping[str, Make]) -> None:
        self.path, self.data, self.methods = path, data, methods
        self.rows: list[Row] = read_csv(path) if path is not None and path.exists() else []

    def get(self, case: Case, rates: Mapping[str, float], seed: int) -> dict[str, list[Row]]:
        """The rows of a run of each method. Missing ones are trained now, in turns, so that their seconds compare."""
        keys = {m: {"case": case.name, "method": m, "lr": lr, "seed": seed} for m, lr in rates.items()}
        found = {m: [r for r in self.rows if all(r[n] == v for n, v in key.items())] for m, key in keys.items()}
        missing = [m for m in rates if not found[m]]
        running = [train(self.data, case, self.methods[m], rates[m], seed) for m in missing]
        for rows in zip(*running, strict=True):
            for m, row in zip(missing, rows, strict=True):
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

    def tuned(self, case: Case) -> dict[str, float]:
        """For each method the rate of the case's grid with the least final training loss, on seeds of its own.

        Where there are finalists, they are the best on the first seed, and the mean over both decides.
        """
        first, second = TUNING_SEEDS
        losses: dict[str, dict[float, float]] = {m: {} for m in self.methods}
        for lr in case.grid:
            for m, rows in self.get(case, dict.fromkeys(self.methods, lr), first).items():
                losses[m][lr] = final_loss(rows)
        best = {m: sorted(found, key=lambda lr, found=found: found[lr]) for m, found in losses.items()}
        if case.finalists == 1:
            return {m: rates[0] for m, rates in best.items()}
        for place in range(case.finalists):
            rates = {m: found[place] for m, found in best.items()}
            for m, rows in self.get(case, rates, second).items():
                losses[m][rates[m]] = (losses[m][rates[m]] + final_loss(rows)) / 2
        return {m: min(best[m][: case.finalists], key=lambda lr, m=m: losses[m][lr]) for m in best}
