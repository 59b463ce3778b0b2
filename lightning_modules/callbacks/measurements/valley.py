"""ValleyWalk: the loss between consecutive iterates, the valley's floor and how high above it SGD walks."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_modules.callbacks.measurements.evaluation import LossOf
from lightning_modules.callbacks.measurements.measurement import Measurement
from lightning_modules.support import quantities
from nsgd.curvature.checks import whole_number
from nsgd.curvature.hessian import loss_hessian
from nsgd.curvature.vectors import flatten
from nsgd.trajectory.line import losses_along, moved
from nsgd.trajectory.valley import cosine, floor_barriers, predicted_height, predicted_position, segment


class ValleyWalk(Measurement):
    """Measure the valley that the iterates cross, in bursts of consecutive steps (Xing et al. 2018, 1802.08770).

    For each step of a burst: the loss at ``points`` + 1 equidistant alphas between the iterates, the floor (vertex of
    the parabola through the three lowest points, and the lowest point of the grid), the height of both ends above it,
    the barrier inside, where the floor would lie on a quadratic, the cosine of this step's gradient with the last
    one's, and the distance from where training began. After a burst, the barriers along its floor. By default three
    bursts: at the beginning, in the middle and at the end. Memory: four copies of the parameters during a burst, one
    between. A step costs ``points`` / 3 + 3 gradients on the evaluation samples.

    Args:
        samples: Evaluation samples; None for as many as the overhead pays, from 16 up to the running batch or 512.
        every: Optimizer steps from the beginning of one burst to that of the next, also where they cost more than the
            overhead; None to spread them over the run.
        overhead: Gradients that measuring may cost for each gradient of training, refreshes not counted.
        length: Steps of a burst.
        points: Points of a step at which the loss is evaluated anew.
        path: The CSV file; None for valley.csv in the folder of the logger, or in ``default_root_dir``.
        seed: Draws the samples.
    """

    name = quantities.VALLEY
    times = 3

    def __init__(
        self,
        samples: int | None = None,
        every: int | None = None,
        overhead: float = 0.15,
        length: int = 40,
        points: int = 10,
        path: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(samples, every, overhead, path, seed)
        length, points = whole_number("length", length, least=1), whole_number("points", points, least=2)
        if self.budget.every is not None and self.budget.every < length:
            raise ValueError(f"expected every of at least {length}, the steps of a burst, got {every}")
        self.length, self.points = length, points
        self._start: Tensor | None = None  # where training began, (P,)
        self._left = 0  # steps of the burst that are to come
        self._walked = 0  # optimizer steps when it was last here
        self._last: Tensor | None = None  # iterate before the step, (P,)
        self._last_loss = 0.0
        self._gradient: Tensor | None = None  # of the last step, (P,)
        self._cosine = math.nan
        self._floors: list[float] = []

    def price(self, product: int) -> float:
        """Gradients of a burst."""
        return self.length * (self.points / 3 + 1 + product)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note where training begins."""
        super().on_train_start(trainer, pl_module)
        self._left, self._last, self._gradient = 0, None, None
        if self._start is None or trainer.global_step == 0:
            self._start = self._iterate(pl_module)

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule, loss_of: LossOf) -> None:
        """Note the first iterate."""
        self._left, self._floors, self._gradient, self._cosine = self.length, [], None, math.nan
        self._last, self._walked = self._iterate(module), trainer.global_step
        self._last_loss = float(self.evaluation.loss(loss_of)().detach())

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Compare the gradient of the step with the last one's."""
        if self._left == 0:
            return
        params = self._params(pl_module)
        gradient = flatten([p.grad for p in params], params)
        self._cosine = math.nan if self._gradient is None else cosine(self._gradient, gradient)
        self._gradient = gradient

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Measure the step that was taken."""
        if self._left == 0 or trainer.global_step == self._walked:
            return
        with self.measuring(pl_module) as loss_of:
            self._segment(self._walked, pl_module, loss_of)
        self._left, self._walked = self._left - 1, trainer.global_step
        if self._left == 0:
            self._finish(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish a burst that the end of training cuts off."""
        self._finish(trainer)
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Finish a burst that something else cuts off."""
        self._finish(trainer)

    def _finish(self, trainer: pl.Trainer) -> None:
        if self._last is None:
            return
        for i, barrier in enumerate(floor_barriers(torch.tensor(self._floors, dtype=torch.float64, device="cpu"))):
            self.table.note(self.rows[-1]["step"], quantities.FLOOR_BARRIER, barrier, at=i)
        self._left, self._last, self._gradient = 0, None, None
        self.table.write(trainer)

    def _segment(self, step: int, module: pl.LightningModule, loss_of: LossOf) -> None:
        assert self._last is not None
        assert self._start is not None
        params = self._params(module)
        iterate = self._iterate(module)
        direction = iterate - self._last
        alphas = torch.linspace(0, 1, self.points + 1, dtype=torch.float64, device="cpu")
        back = [float(alpha) - 1 for alpha in alphas[1:]]
        losses = torch.cat(
            [
                torch.tensor([self._last_loss], dtype=torch.float64, device="cpu"),
                losses_along(self.evaluation.loss(loss_of), params, direction, back),
            ]
        )
        slope = curvature = math.nan
        with (
            suppress(FloatingPointError),  # training has diverged, which is not for a measurement to end
            moved(params, direction, -1.0),
            loss_hessian(self.evaluation.curvature_loss(loss_of), params) as hessian,
        ):
            self.evaluation.spend(hessian.cost(1))
            slope = float(torch.dot(hessian.gradient, direction))
            curvature = float(torch.dot(direction, hessian.hvp(direction)))
        step_taken = segment(alphas, losses)
        for alpha, loss in zip(alphas.tolist(), losses.tolist(), strict=True):
            self.table.note(step, quantities.LOSS, loss, at=alpha)
        values = {
            quantities.POSITION: step_taken.position,
            quantities.FLOOR: step_taken.floor,
            quantities.GRID_POSITION: step_taken.grid_position,
            quantities.GRID_FLOOR: step_taken.grid_floor,
            quantities.HEIGHT: step_taken.height,
            quantities.BARRIER: step_taken.barrier,
            quantities.PREDICTED_POSITION: predicted_position(slope, curvature),
            quantities.PREDICTED_HEIGHT: predicted_height(slope, curvature),
            quantities.COSINE: self._cosine,
            quantities.DISTANCE: float(torch.linalg.vector_norm(iterate - self._start.to(iterate))),
        }
        for quantity, value in values.items():
            self.table.note(step, quantity, value)
        self._floors.append(step_taken.floor)
        self._last, self._last_loss = iterate, float(losses[-1])

    @staticmethod
    def _params(module: pl.LightningModule) -> list[nn.Parameter]:
        """All parameters: some may be frozen for a while."""
        return list(module.parameters())

    def _iterate(self, module: pl.LightningModule) -> Tensor:
        params = self._params(module)
        return flatten(params, params)

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, and where training began."""
        return {**super().state_dict(), "start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with saved rows; a burst that was cut off is not taken up again."""
        super().load_state_dict(state_dict)
        self._start = state_dict["start"]
