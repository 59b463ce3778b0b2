"""Measurements with little to do, and a loss whose every quantity has a closed form."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
from strangers import Smooth, classes, seeded
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_modules.callbacks.measurements.averaging import AveragingExperiment
from lightning_modules.callbacks.measurements.measurement import Measurement
from lightning_modules.callbacks.measurements.quadratic import BatchQuadratic
from lightning_modules.callbacks.measurements.sharpness import SharpnessMonitor
from lightning_modules.callbacks.measurements.valley import ValleyWalk

Make = Callable[..., Measurement]
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
# Each with little to do, so that it measures several times in a few steps.
FREQUENT: dict[str, Make] = {
    "valley": partial(ValleyWalk, samples=8, every=4, length=3, points=2),
    "quadratic": partial(BatchQuadratic, every=3),
    "sharpness": partial(SharpnessMonitor, samples=8, every=6, k=1, products=4, batches=1),
    "averaging": partial(AveragingExperiment, samples=8, steps=8),
}
MAKERS: dict[str, Make] = {
    "valley": ValleyWalk,
    "quadratic": BatchQuadratic,
    "sharpness": SharpnessMonitor,
    "averaging": AveragingExperiment,
}
EACH = pytest.mark.parametrize("name", MAKERS)


def all_four() -> list[Measurement]:
    return [make() for make in FREQUENT.values()]


SPECTRUM = torch.tensor([8.0, 5.0, 3.0, 1.0, 0.5, 0.1, 0.02], dtype=torch.float64)
ROTATION = torch.linalg.qr(torch.randn(7, 7, generator=seeded(0), dtype=torch.float64)).Q
HESSIAN = ROTATION @ SPECTRUM.diag() @ ROTATION.T
CENTRES = torch.randn(96, 7, generator=seeded(1), dtype=torch.float64)


def near(value: float, expected: float, *, abs: float = 1e-8) -> bool:
    """Closed forms and measurements round differently, in float64."""
    return value == pytest.approx(expected, abs=abs, rel=1e-8)


def loss_at(theta: Tensor, centres: Tensor) -> float:
    offset = theta - centres
    return float(((offset @ HESSIAN) * offset).sum(1).mean() / 2)


def gradient_at(theta: Tensor, centres: Tensor) -> Tensor:
    return HESSIAN @ (theta - centres.mean(0))


class Bowl(pl.LightningModule):
    """Every sample is the minimum of a quadratic; all have one Hessian. Seven parameters in two tensors."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.make = make
        start = 3 * torch.randn(7, generator=seeded(2), dtype=torch.float64)
        self.theta = nn.ParameterList([start[:3].clone(), start[3:].reshape(2, 2).clone()])

    def flat(self) -> Tensor:
        return torch.cat([t.reshape(-1) for t in self.theta])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        offset = self.flat() - batch[0]
        return ((offset @ HESSIAN) * offset).sum(1).mean() / 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())


def bowls(batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(CENTRES), batch_size=batch_size)


class Iterates(pl.Callback):
    """The parameters before every step and after the last, and the batches of each step."""

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}
        self.batches: dict[int, list[Tensor]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.found.setdefault(trainer.global_step, pl_module.flat().detach().clone())
        self.batches.setdefault(trainer.global_step, []).append(batch[0])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.found.setdefault(trainer.global_step, pl_module.flat().detach().clone())


def table(callback: Any) -> dict[tuple[Any, ...], float]:
    """Step, quantity, of and at to the value; every row has a key of its own."""
    found = {(r["step"], r["quantity"], r["of"], r["at"]): r["value"] for r in callback.rows}
    assert len(found) == len(callback.rows)
    return found


def drawn(callback: Any, method: str) -> list[Any]:
    """Everything that a method of this callback returns from now on."""
    kept, original = [], getattr(callback, method)

    def noted(*args: Any, **kwargs: Any) -> Any:
        kept.append(original(*args, **kwargs))
        return kept[-1]

    setattr(callback, method, noted)
    return kept


def samples_of(parts: list[tuple[Any, int]]) -> Tensor:
    return torch.cat([batch[0] for batch, _ in parts])


class Tally:
    """Work in gradients by one rule, from what torch is asked to do: forward 1/3, backward 2/3, product 2."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.active, self.work, self.size = False, 0.0, 0
        original = torch.autograd.grad

        def grad(outputs: Any, inputs: Any, grad_outputs: Any = None, **options: Any) -> Any:
            if self.active:
                self.work += self.size * (2 / 3 if grad_outputs is None else 2)
            return original(outputs, inputs, grad_outputs, **options)

        monkeypatch.setattr(torch.autograd, "grad", grad)

    def saw(self, samples: int) -> None:
        if self.active:
            self.size = samples
            self.work += samples / 3

    def around(self, callback: Measurement) -> Measurement:
        for hook in ("on_train_batch_start", "on_train_batch_end", "on_train_end"):
            setattr(callback, hook, partial(self._counted, getattr(callback, hook)))
        return callback

    def _counted(self, hook: Any, *args: Any) -> None:
        self.active = True
        hook(*args)
        self.active = False


class Counted(Smooth):
    tally: ClassVar[Any] = None  # on the class: what an instance holds is put back after a measurement

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.tally.saw(len(batch[0]))
        return super().training_step(batch, batch_idx)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from classes(features=2, number=2)
