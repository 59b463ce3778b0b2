"""BatchQuadratic: the loss of one mini-batch along its own gradient, and what the step does to another batch."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytorch_lightning as pl
import torch

from lightning_modules.callbacks.measurements.evaluation import LossOf
from lightning_modules.callbacks.measurements.measurement import Measurement, trainable
from lightning_modules.support import quantities
from nsgd.trajectory.line import losses_along
from nsgd.trajectory.quadratic import r_squared

_MULTIPLES = (0.25, 0.5, 1.0, 1.5, 2.0)  # of the rate that is predicted to be the best one


class BatchQuadratic(Measurement):
    """Measure mini-batches as quadratics along their own gradients (Sandler et al. 2023, 2301.02312).

    Each measurement draws two batches of training samples, as large as the running batch. Of the first: the loss, the
    squared gradient |g|^2, the curvature g^T H g, the best rate |g|^2 / g^T H g, the losses after steps at multiples of
    it, and the R^2 of the predicted losses. Of the second, which the step has not seen: its losses after steps at
    multiples of the learning rate, and after the first's best step. A third batch is the same all along the path: its
    loss there, and after the best step along its own gradient, measured and predicted. By default twenty times in a
    run, at 11 gradients each.

    Args:
        every: Optimizer steps from one measurement to the next, also where they cost more than the overhead; None to
            spread them over the run.
        overhead: Gradients that measuring may cost for each gradient of training, refreshes not counted.
        path: The CSV file; None for quadratic.csv in the folder of the logger, or in ``default_root_dir``.
        seed: Draws the batches.
    """

    name = quantities.QUADRATIC
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
        """Two gradients, two products, and forward passes."""
        return 6 + (2 * len(_MULTIPLES) + 5) / 3

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule, loss_of: LossOf) -> None:
        """Measure one pair of batches, and the fixed one."""
        step, lr = trainer.global_step, float(trainer.optimizers[0].param_groups[0]["lr"])
        params, note = trainable(module), self.table.note
        seen, unseen = ([batch] for batch in self.evaluation.draw_batches(trainer, module, 2))
        gradient, quadratic = self.evaluation.along_gradient(loss_of, seen, params)
        start = float(losses_along(self.evaluation.loss(loss_of, seen), params, gradient, [0.0]))
        quadratic = replace(quadratic, loss=start)
        best = quadratic.best_rate
        note(step, quantities.LR, lr)
        note(step, quantities.SQUARED_GRADIENT, quadratic.squared_gradient)
        note(step, quantities.CURVATURE, quadratic.curvature)
        note(step, quantities.BEST_RATE, best)
        # Without positive curvature there is no best rate; the learning rate gives the scale.
        rates = torch.tensor(_MULTIPLES, dtype=torch.float64, device="cpu") * (best if math.isfinite(best) else lr)
        losses = losses_along(self.evaluation.loss(loss_of, seen), params, gradient, [-float(rate) for rate in rates])
        predicted = quadratic.predicted(rates)
        rates, losses, predicted = (
            torch.cat([torch.tensor([first], dtype=torch.float64, device="cpu"), rest])
            for first, rest in ((0.0, rates), (start, losses), (start, predicted))
        )
        for rate, loss, prediction in zip(rates.tolist(), losses.tolist(), predicted.tolist(), strict=True):
            note(step, quantities.LOSS, loss, of=quantities.OWN, at=rate)
            note(step, quantities.PREDICTED_LOSS, prediction, of=quantities.OWN, at=rate)
        note(step, quantities.R_SQUARED, r_squared(losses, predicted))
        steps = [0.0, *(multiple * lr for multiple in _MULTIPLES), *([best] if math.isfinite(best) else [])]
        losses = losses_along(self.evaluation.loss(loss_of, unseen), params, gradient, [-rate for rate in steps])
        for rate, loss in zip(steps, losses.tolist(), strict=True):
            note(step, quantities.LOSS, loss, of=quantities.HELD_OUT, at=rate)
        self._fixed(trainer, module, loss_of)

    def _fixed(self, trainer: pl.Trainer, module: pl.LightningModule, loss_of: LossOf) -> None:
        """The batch that is the same all along: drawn again each time, by the same seed."""
        step, params, note = trainer.global_step, trainable(module), self.table.note
        batch = self.evaluation.draw(trainer, module, self.budget.micro_batch, seed=self.seed)
        gradient, quadratic = self.evaluation.along_gradient(loss_of, batch, params)
        best = quadratic.best_rate
        steps = [0.0, -best] if math.isfinite(best) else [0.0]
        start, *end = losses_along(self.evaluation.loss(loss_of, batch), params, gradient, steps).tolist()
        note(step, quantities.LOSS, start, of=quantities.FIXED, at=0.0)
        predicted = replace(quadratic, loss=start).best_loss
        for loss in end:  # none without positive curvature
            note(step, quantities.LOSS, loss, of=quantities.FIXED, at=best)
            note(step, quantities.PREDICTED_LOSS, predicted, of=quantities.FIXED, at=best)
