"""AveragingExperiment: averages of iterates beside runs under the learning-rate schedules that they equal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_modules.callbacks.measurements.evaluation import FORWARD, LossOf, Parts
from lightning_modules.callbacks.measurements.measurement import Measurement, trainable
from lightning_modules.support import quantities
from nsgd.curvature.checks import whole_number
from nsgd.curvature.hessian import gradient_of, loss_hessian
from nsgd.curvature.vectors import flatten, split
from nsgd.trajectory.averaging import ema_weights, swa_weights, tail_sums, two_point_loss, two_point_weights
from nsgd.trajectory.line import losses_along, moved

_EMA_STEPS = 4  # the branch over the length that the exponential average remembers


class AveragingExperiment(Measurement):
    """Compare averages with the schedules that they equal, from the last weights on (Sandler et al. 2023, 2301.02312).

    When training ends, plain SGD at a constant rate goes on for some steps, on small batches of the training set. Its
    EMA, its SWA and the mean of two of its points are compared with SGD from the same start, on the same batches, under
    the schedules lr times the tail sums of their weights: losses on the evaluation samples, and distances. Then the
    gain of two points against their spacing, measured and predicted. The weights are put back, and so is all else.

    Args:
        samples: Evaluation samples, and samples of a batch; None for as many as the overhead pays, from 16 up to the
            running batch or 512.
        overhead: Gradients that measuring may cost for each gradient of training, refreshes not counted.
        steps: Steps of SGD at the constant rate, 8 or more; each schedule takes as many.
        lr: Its learning rate; None for the largest that the optimizer had, or less where the curvature along the first
            gradient would make it diverge.
        path: The CSV file; None for averaging.csv in the folder of the logger, or in ``default_root_dir``.
        seed: Draws the samples.
    """

    name = quantities.AVERAGING
    times = 1

    def __init__(
        self,
        samples: int | None = None,
        overhead: float = 0.15,
        steps: int = 40,
        lr: float | None = None,
        path: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(samples, None, overhead, path, seed)
        steps = whole_number("steps", steps, least=8)
        if lr is not None and not 0 < lr < math.inf:
            raise ValueError(f"expected lr to be a finite number above 0, or None, got {lr}")
        self.steps, self.lr = steps, lr
        self._largest = 0.0  # learning rate so far

    def weights(self) -> dict[str, Tensor]:
        """Weights of the iterates in each average, (steps + 1,)."""
        return {
            quantities.EMA: ema_weights(self.steps, decay=1 - _EMA_STEPS / self.steps),
            quantities.SWA: swa_weights(self.steps, window=self.steps // 2),
            quantities.TWO_POINTS: two_point_weights(self.steps, spacing=self.steps // 2),
        }

    def spacings(self) -> list[int]:
        """Spacings of the two points whose gain is measured: powers of two up to the steps."""
        return [2**i for i in range(self.steps.bit_length()) if 2**i <= self.steps]

    def price(self, product: int) -> float:
        """Gradients of the experiment on as many samples as a training batch has."""
        runs = 1 + len(self.weights())
        return 1 + product + runs * self.steps + (2 * runs - 1) / 3 + (2 + product) * len(self.spacings())

    def is_due(self, step: int) -> bool:
        """Not while training goes on."""
        return False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the learning rate: schedules may end at 0."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._largest = max(self._largest, float(trainer.optimizers[0].param_groups[0]["lr"]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the experiment."""
        if self.budget.plan is not None:
            self.measure(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule, loss_of: LossOf) -> None:
        """From the current parameters, which are put back."""
        params = trainable(module)
        start = flatten(params, params)
        count, draw = self.evaluation.size, self.evaluation.draw
        # In the order of the steps, the same for every schedule; samples may come back in later batches.
        batches = [draw(trainer, module, count, seed=self.seed + 1 + i)[:1] for i in range(self.steps)]
        step, lr = trainer.global_step, self._rate(loss_of, batches[0], params)
        self.table.note(step, quantities.LR, lr)
        try:
            self._experiment(step, loss_of, params, start, batches, lr)
        finally:
            _assign(params, start)

    def _rate(self, loss_of: LossOf, batch: Parts, params: list[nn.Parameter]) -> float:
        if self.lr is not None:
            return self.lr
        _, quadratic = self.evaluation.along_gradient(loss_of, batch, params)
        return min(self._largest, quadratic.best_rate)

    def _branch(
        self, loss_of: LossOf, batches: list[Parts], params: list[nn.Parameter], rates: Tensor
    ) -> Iterator[Tensor]:
        """SGD at these rates: the iterates, the first included, (P,) each."""
        yield flatten(params, params)
        for batch, rate in zip(batches, rates.tolist(), strict=True):
            gradient = gradient_of(self.evaluation.loss(loss_of, batch)(), params, create_graph=False)
            self.evaluation.spend(1 - FORWARD, batch)
            with torch.no_grad():
                for p, g in zip(params, gradient, strict=True):
                    if g is not None:
                        p.sub_(g, alpha=rate)
            yield flatten(params, params)

    def _experiment(
        self,
        step: int,
        loss_of: LossOf,
        params: list[nn.Parameter],
        start: Tensor,
        batches: list[Parts],
        lr: float,
    ) -> None:
        weights = self.weights()
        averages = {name: torch.zeros_like(start) for name in weights}
        before: dict[int, Tensor] = {}  # spacing to the iterate so many steps before the last
        last = start
        for t, last in enumerate(
            self._branch(loss_of, batches, params, torch.full((self.steps,), lr, dtype=torch.float64, device="cpu"))
        ):
            for name, average in averages.items():
                average.add_(last, alpha=float(weights[name][t]))
            if self.steps - t in self.spacings():
                before[self.steps - t] = last
        loss = self.evaluation.loss(loss_of)

        def note(quantity: str, value: float | Tensor, *, of: str) -> None:
            self.table.note(step, quantity, value, of=of)

        def note_point(name: str, point: Tensor) -> None:
            _assign(params, start)
            note(quantities.LOSS, losses_along(loss, params, point - start, [1.0]), of=name)
            note(quantities.START_DISTANCE, torch.linalg.vector_norm(point - start), of=name)

        note_point(quantities.LAST, last)
        for name, average in averages.items():
            *_, scheduled = self._branch(loss_of, batches, params, lr * tail_sums(weights[name]))
            note_point(name, average)
            note_point(quantities.schedule_of(name), scheduled)
            note(quantities.SCHEDULE_DISTANCE, torch.linalg.vector_norm(average - scheduled), of=name)
            note(quantities.LAST_DISTANCE, torch.linalg.vector_norm(average - last), of=name)
        _assign(params, last)
        for spacing, point in sorted(before.items()):
            self._gain(step, loss_of, params, point - last, spacing)

    def _gain(self, step: int, loss_of: LossOf, params: list[nn.Parameter], difference: Tensor, spacing: int) -> None:
        """The depth of the loss at the mean of two points below the mean of their losses."""
        evaluation, note = self.evaluation, self.table.note
        late, middle, early = losses_along(evaluation.loss(loss_of), params, difference, [0.0, 0.5, 1.0]).tolist()
        with moved(params, difference, 0.5), loss_hessian(evaluation.curvature_loss(loss_of), params) as hessian:
            curvature = float(torch.dot(difference, hessian.hvp(difference)))
            evaluation.spend(hessian.cost(1))
        mean = (late + early) / 2
        note(step, quantities.TWO_POINT_GAIN, mean - middle, at=spacing)
        predicted = mean - two_point_loss([late, early], curvature=curvature)
        note(step, quantities.PREDICTED_TWO_POINT_GAIN, predicted, at=spacing)
        note(step, quantities.SQUARED_DISTANCE, torch.dot(difference, difference), at=spacing)

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, and the largest learning rate."""
        return {**super().state_dict(), "largest": self._largest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with saved rows."""
        super().load_state_dict(state_dict)
        self._largest = state_dict["largest"]


@torch.no_grad()
def _assign(params: list[nn.Parameter], point: Tensor) -> None:
    for p, block in zip(params, split(point, params), strict=True):
        p.copy_(block)
