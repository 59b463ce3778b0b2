"""BatchQuadratic: the loss of one mini-batch along its own gradient, and what the step does to another batch."""

from __future__ import annotations

import math
from pathlib import Path

import pytorch_lightning as pl
import torch

from lightning_modules.callbacks.measurements.measurement import LossOf, Measurement
from nsgd.trajectory.line import losses_along
from nsgd.trajectory.quadratic import OwnBatch, r_squared

_MULTIPLES = (0.25, 0.5, 1.0, 1.5, 2.0)  # of the rate that is predicted to be the best one


class BatchQuadratic(Measurement):
    """Measure mini-batches as quadratics along their own gradients (Sandler et al. 2023, 2301.02312).

    Each measurement draws two batches of training samples, as large as the running batch. Of the first: the loss, the
    squared gradient |g|^2, the curvature g^T H g, the best rate |g|^2 / g^T H g, the losses after steps at multiples of
    it, and the R^2 of the predicted losses. Of the second, which the step has not seen: its losses after steps at
    multiples of the learning rate, and after the first's best step. By default twenty times in a run, at 7 1/3
    gradients each.

    Args:
        every: Optimizer steps from one measurement to the next, also where they cost more than the overhead; None to
            spread them over the run.
        overhead: Gradients that measuring may cost for each gradient of training, refreshes not counted.
        path: The CSV file; None for quadratic.csv in the folder of the logger, or in ``default_root_dir``.
        seed: Draws the batches.
    """

    name = "quadratic"
    times = 20
    fresh = 2

    def __init__(
        self, every: int | None = None, overhead: float = 0.15, path: str | Path | None = None, seed: int = 0
    ) -> None:
        super().__init__(None, every, overhead, path, seed)
        self.samples = 0  # of an evaluation set: there is none

    def price(self, product: int) -> float:
        """No evaluation samples are needed."""
        return 0.0

    def fixed_price(self) -> float:
        """A gradient, a product, and forward passes."""
        return 3 + (2 * len(_MULTIPLES) + 3) / 3

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule, loss_of: LossOf) -> None:
        """Measure one pair of batches."""
        step, lr = trainer.global_step, float(trainer.optimizers[0].param_groups[0]["lr"])
        params = self.params(module)
        own, other = ([batch] for batch in self.draw_batches(trainer, module, 2))
        gradient, squared, curvature = self.along_gradient(loss_of, own, params)
        start = float(losses_along(self.loss(loss_of, own), params, gradient, [0.0]))
        quadratic = OwnBatch(start, squared, curvature)
        best = quadratic.best_rate
        self.note(step, "lr", lr)
        self.note(step, "squared gradient", quadratic.squared_gradient)
        self.note(step, "curvature", curvature)
        self.note(step, "best rate", best)
        # Without positive curvature there is no best rate; the learning rate gives the scale.
        rates = torch.tensor(_MULTIPLES, dtype=torch.float64) * (best if math.isfinite(best) else lr)
        losses = losses_along(self.loss(loss_of, own), params, gradient, [-float(rate) for rate in rates])
        predicted = quadratic.predicted(rates)
        rates, losses, predicted = (
            torch.cat([torch.tensor([first], dtype=torch.float64), rest])
            for first, rest in ((0.0, rates), (start, losses), (start, predicted))
        )
        for rate, loss, guess in zip(rates.tolist(), losses.tolist(), predicted.tolist(), strict=True):
            self.note(step, "loss", loss, of="own", at=rate)
            self.note(step, "predicted loss", guess, of="own", at=rate)
        self.note(step, "R^2", r_squared(losses, predicted))
        unseen = [0.0, *(multiple * lr for multiple in _MULTIPLES), *([best] if math.isfinite(best) else [])]
        found = losses_along(self.loss(loss_of, other), params, gradient, [-rate for rate in unseen])
        for rate, loss in zip(unseen, found.tolist(), strict=True):
            self.note(step, "loss", loss, of="held out", at=rate)
