"""AveragingExperiment: averages of iterates beside runs under the learning-rate schedules that they equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_modules.callbacks.measurements.evaluation import FORWARD, LossOf, Parts
from lightning_modules.callbacks.measurements.local_model import LocalModel, fit_model, without
from lightning_modules.callbacks.measurements.measurement import Measurement, trainable
from lightning_modules.support import quantities
from nsgd.curvature.checks import whole_number
from nsgd.curvature.eigen import top_eigenpairs
from nsgd.curvature.hessian import gradient_of, loss_hessian
from nsgd.curvature.vectors import flatten, split
from nsgd.trajectory.averaging import ema_weights, swa_weights, two_point_loss, two_point_weights
from nsgd.trajectory.line import losses_along, moved

_EMA_STEPS = 4  # the branch over the length that the exponential average remembers


class AveragingExperiment(Measurement):
    """Compare averages with the schedules that they equal, from the last weights on (Sandler et al. 2023, 2301.02312).

    When training ends, plain SGD at a constant rate goes on for some steps, on small batches of the training set. Its
    EMA, its SWA, the mean of two of its points and the mean of all of them are compared with SGD from the same start,
    on the same batches, under the schedules that they equal on a quadratic: losses on the evaluation samples. A
    schedule has a rate of its own along each of the sharpest directions, exact for the curvature there, and one for all
    the rest, whose curvature is taken to be that along a batch's gradient. All of it is repeated on other batches, so
    that the page can judge mean losses, with intervals.

    The model also predicts mean losses, of every window and every spacing of two points, which stand beside the
    measured ones. Then, for the first replicate, the gain of two points, measured and predicted. The weights are put
    back, and so is all else. Holds k + 20 copies of the parameters, or some more for many steps.

    Args:
        samples: Evaluation samples, and samples of a batch; None for as many as the overhead pays, from 16 up to the
            running batch or 512.
        overhead: Gradients that measuring may cost for each gradient of training, refreshes not counted.
        steps: Steps of SGD at the constant rate, 8 or more; each schedule takes as many.
        lr: Its learning rate; None for the largest that the optimizer had, but 1 over the top eigenvalue at most: above
            it, schedules that averages equal have rates below 0 and far above lr.
        replicates: Repetitions on other batches; with one, nothing is resolved.
        k: Sharpest directions, each with a rate of its own.
        path: The CSV file; None for averaging.csv in the folder of the logger, or in ``default_root_dir``.
        seed: Draws the samples.
    """

    name = quantities.AVERAGING
    times = 1

    def __init__(
        self,
        samples: int | None = None,
        overhead: float = 0.15,
        steps: int = 20,
        lr: float | None = None,
        replicates: int = 4,
        k: int = 6,
        path: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(samples, None, overhead, path, seed)
        steps = whole_number("steps", steps, least=8)
        if lr is not None and not 0 < lr < math.inf:
            raise ValueError(f"expected lr to be a finite number above 0, or None, got {lr}")
        self.steps, self.lr = steps, lr
        self.replicates, self.k = whole_number("replicates", replicates, least=1), whole_number("k", k, least=1)
        self._largest = 0.0  # learning rate so far

    def weights(self) -> dict[str, Tensor]:
        """Weights of the iterates in each average that has a schedule beside it, (steps + 1,)."""
        return {
            quantities.EMA: ema_weights(self.steps, decay=1 - _EMA_STEPS / self.steps),
            quantities.SWA: swa_weights(self.steps, window=self.steps // 2),
            quantities.TWO_POINTS: two_point_weights(self.steps, spacing=self.steps // 2),
            quantities.WHOLE: swa_weights(self.steps, window=self.steps + 1),
        }

    def spacings(self) -> list[int]:
        """Spacings of the two points whose gain is measured: powers of two up to the steps."""
        return [2**i for i in range(self.steps.bit_length()) if 2**i <= self.steps]

    def scales(self) -> dict[tuple[str, int], Tensor]:
        """Weights of the iterates over the time scales: windows up to the whole run, and spacings of two points."""
        windows = sorted({*self.spacings()[1:], self.steps + 1})
        return {
            **{(quantities.WINDOW, n): swa_weights(self.steps, window=n) for n in windows},
            **{(quantities.SPACING, n): two_point_weights(self.steps, spacing=n) for n in self.spacings()},
        }

    @property
    def products(self) -> int:
        """Hessian-vector products for the sharpest directions."""
        return 2 * self.k + 4

    def price(self, product: int) -> float:
        """Gradients of the experiment on as many samples as a training batch has."""
        runs = 1 + len(self.weights())
        model = 1 + product * (self.products + 1) + FORWARD + self.steps
        points = 2 * runs - 1 + len(self.scales())
        gains = (2 + product) * len(self.spacings())
        return model + self.replicates * (runs * self.steps + points * FORWARD) + gains

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

        def batches(series: int) -> list[Parts]:
            """In the order of the steps; samples may come back in later batches."""
            first = self.seed + 1 + series * self.steps
            return [draw(trainer, module, count, seed=first + i)[:1] for i in range(self.steps)]

        step, note = trainer.global_step, self.table.note
        loss = float(losses_along(self.evaluation.loss(loss_of), params, start, [0.0]))
        note(step, quantities.LOSS, loss, of=quantities.START)
        try:
            model = self._model(loss_of, params, batches(self.replicates), loss)
            lr = self._rate(float(model.curvatures[0]))
            note(step, quantities.LR, lr)
            self._note_model(step, model, lr)
            for replicate in range(self.replicates):
                self.table.number += replicate > 0  # each is a measurement of its own
                before = self._replicate(step, loss_of, params, batches(replicate), start, model, lr)
                if not replicate:
                    _assign(params, before[0])
                    for spacing in self.spacings():
                        self._gain(step, loss_of, params, before[spacing] - before[0], spacing)
        finally:
            _assign(params, start)

    def _rate(self, top: float) -> float:
        if self.lr is not None:
            return self.lr
        return min(self._largest, 1 / top) if top > 0 else self._largest

    def _gradient(self, loss_of: LossOf, batch: Parts, params: list[nn.Parameter]) -> Tensor:
        gradient = gradient_of(self.evaluation.loss(loss_of, batch)(), params, create_graph=False)
        self.evaluation.spend(1 - FORWARD, batch)
        return flatten(gradient, params)

    def _model(self, loss_of: LossOf, params: list[nn.Parameter], batches: list[Parts], loss: float) -> LocalModel:
        """Of the loss on the evaluation samples, with the gradients of these batches; two batches or more."""
        evaluation = self.evaluation
        first, size = self._gradient(loss_of, batches[0], params), sum(p.numel() for p in params)
        with loss_hessian(evaluation.curvature_loss(loss_of), params) as hessian:
            gradient = hessian.gradient
            pairs = top_eigenpairs(
                hessian.hvp,
                params,
                k=min(self.k, size),
                start=gradient,
                max_hvps=self.products,
                seed=self.seed,
                repeated=False,
            )
            basis = pairs.eigenvectors
            rest = without(basis, first)
            norm = float(torch.dot(rest, rest))
            left = len(basis) < size and norm > 0
            beyond = float(torch.dot(rest, hessian.hvp(rest))) / norm if left else 0.0
            evaluation.spend(hessian.cost(pairs.hvps + left))
        curvatures = torch.cat(
            [pairs.eigenvalues.double().cpu(), torch.tensor([beyond], dtype=torch.float64, device="cpu")]
        )
        gradients = (self._gradient(loss_of, batch, params) for batch in batches[1:])
        return fit_model(
            loss, basis=basis, curvatures=curvatures, gradient=gradient, gradients=chain([first], gradients)
        )

    def _note_model(self, step: int, model: LocalModel, lr: float) -> None:
        note = self.table.note
        for i, curvature in enumerate(model.curvatures[:-1].tolist()):
            note(step, quantities.CURVATURE, curvature, of=quantities.eigenvector(i + 1))
        note(step, quantities.CURVATURE, model.curvatures[-1], of=quantities.REST)
        for name, weights in {quantities.LAST: ema_weights(self.steps, decay=0.0), **self.weights()}.items():
            note(step, quantities.PREDICTED_LOSS, model.expected_loss(weights, lr=lr), of=name)
        for (kind, at), weights in self.scales().items():
            note(step, quantities.PREDICTED_LOSS, model.expected_loss(weights, lr=lr), of=kind, at=at)

    def _branch(
        self, loss_of: LossOf, batches: list[Parts], params: list[nn.Parameter], basis: Tensor, rates: Tensor
    ) -> Iterator[Tensor]:
        """SGD at rates (k + 1, T) along a basis (k, P) and in the rest: the iterates, the first included, (P,) each."""
        yield flatten(params, params)
        for batch, rate in zip(batches, rates.T, strict=True):
            gradient = self._gradient(loss_of, batch, params)
            more = (rate[:-1] - rate[-1]).to(basis)
            change = float(rate[-1]) * gradient + (more * (basis @ gradient)) @ basis
            with torch.no_grad():
                for p, block in zip(params, split(change, params), strict=True):
                    p.sub_(block)
            yield flatten(params, params)

    def _replicate(
        self,
        step: int,
        loss_of: LossOf,
        params: list[nn.Parameter],
        batches: list[Parts],
        start: Tensor,
        model: LocalModel,
        lr: float,
    ) -> dict[int, Tensor]:
        """Note the losses of averages and schedules; returns the last iterate, 0, and those so many steps before it."""
        weights = self.weights()
        every: dict[tuple[str, int | None], Tensor] = {(name, None): of for name, of in weights.items()}
        every.update({(kind, at): of for (kind, at), of in self.scales().items()})
        averages = {key: torch.zeros_like(start) for key in every}
        before: dict[int, Tensor] = {}
        _assign(params, start)
        constant = torch.full((1, self.steps), lr, dtype=torch.float64, device="cpu")
        for t, point in enumerate(self._branch(loss_of, batches, params, model.basis[:0], constant)):
            for key, average in averages.items():
                if every[key][t]:
                    average.add_(point, alpha=float(every[key][t]))
            if self.steps - t in (0, *self.spacings()):
                before[self.steps - t] = point
        _assign(params, start)
        note_loss = self._loss_at(step, loss_of, params, start)
        note_loss(quantities.LAST, before[0])
        for (name, at), average in averages.items():
            note_loss(name, average, at=at)
        for name in weights:
            rates = model.schedule(weights[name], lr=lr)
            *_, scheduled = self._branch(loss_of, batches, params, model.basis, rates)
            _assign(params, start)
            note_loss(quantities.schedule_of(name), scheduled)
        return before

    def _loss_at(self, step: int, loss_of: LossOf, params: list[nn.Parameter], start: Tensor) -> Callable[..., None]:
        """Notes the loss on the evaluation samples at a point; the parameters lie at the start."""
        loss = self.evaluation.loss(loss_of)

        def note_loss(name: str, point: Tensor, at: float | None = None) -> None:
            value = losses_along(loss, params, point - start, [1.0])
            self.table.note(step, quantities.LOSS, value, of=name, at=at)

        return note_loss

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
