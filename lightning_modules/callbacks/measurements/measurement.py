"""The hooks of a measurement: it measures where its budget says, and training does not notice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import nn

from lightning_modules.callbacks.measurements.budget import Budget
from lightning_modules.callbacks.measurements.evaluation import EvaluationSample, LossOf
from lightning_modules.callbacks.measurements.table import Table
from lightning_modules.data.cutting import batch_size_of
from lightning_modules.models.batch_loss import batch_losses
from lightning_modules.support.files import Rows
from nsgd.curvature.checks import count_or_none


class Measurement(pl.Callback):
    """A callback that measures along the way; training stays bit-identical, and what it costs is counted.

    It holds a budget, which says when, an evaluation sample, which losses are taken on, and a table, which goes to a
    CSV file. Losses are those of :func:`lightning_modules.models.batch_loss.batch_losses`. A measurement of your own
    has a ``name``, a ``price`` and ``begin``.

    Args:
        samples: Evaluation samples; None for as many as the overhead pays, from 16 up to the running batch or 512.
        every: Optimizer steps from the beginning of one measurement to that of the next, also where they cost more
            than the overhead; None to spread them over the run.
        overhead: Gradients that measuring may cost for each gradient of training, refreshes not counted.
        path: The CSV file; None for one named after the measurement in the folder of the logger, or in
            ``default_root_dir`` where there is none.
        seed: Draws the samples.

    Raises:
        ValueError: If an option is out of range; when training starts, if the number of steps is not known and
            ``every`` is not given, or if the training set is a stream.
    """

    name: ClassVar[str]
    times: ClassVar[int]  # measurements in a run, if the overhead pays them
    length = 1  # optimizer steps that one extends over
    fresh = 0  # training batches that one draws

    def __init__(
        self,
        samples: int | None = None,
        every: int | None = None,
        overhead: float = 0.15,
        path: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        self.samples, self.seed = count_or_none("samples", samples), seed
        self.budget = Budget(every=every, overhead=overhead)
        self.evaluation = EvaluationSample(budget=self.budget, seed=seed, owner=type(self).__name__)
        self.table = Table(self.name, path=path)

    # -- what each measurement says of itself --------------------------------------------------------------------

    def price(self, product: int) -> float:
        """Gradients of one measurement on as many evaluation samples as a training batch has.

        Args:
            product: Gradients of a Hessian-vector product, 2 on one graph, 3 where there is one a batch.
        """
        raise NotImplementedError

    def fixed_price(self) -> float:
        """Gradients, of one running batch each, that a measurement takes on batches of its own."""
        return 0.0

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule, loss_of: LossOf) -> None:
        """Measure, or begin to, before the step that comes."""
        raise NotImplementedError

    # -- what it has measured ------------------------------------------------------------------------------------

    @property
    def rows(self) -> Rows:
        """Those of its table so far."""
        return self.table.rows

    @property
    def gradients(self) -> float:
        """Cost of measuring so far, in gradients of training."""
        return self.budget.gradients

    @property
    def seconds(self) -> float:
        """Cost of measuring so far, in seconds."""
        return self.budget.seconds

    # -- hooks -----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget an earlier run."""
        self.budget.restart(trainer.global_step)
        self.table.restart(trainer.global_step)
        self.evaluation.parts = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure where it is due."""
        if self.budget.plan is None:
            self._prepare(trainer, pl_module, batch)
        if self.is_due(trainer.global_step):
            self.measure(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what it cost."""
        if self.table.file is not None and trainer.global_step:
            rank_zero_info(
                f"{type(self).__name__} measured {self.table.number} times at {self.gradients:.0f} gradients, "
                f"{100 * self.gradients / trainer.global_step:.0f} % of training's {trainer.global_step}, in "
                f"{self.seconds:.1f} s: {self.table.file}"
            )

    def is_due(self, step: int) -> bool:
        """Whether a measurement begins after so many optimizer steps."""
        return self.budget.is_due(step)

    def measure(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin a measurement, and write what it gives."""
        self.table.number += 1
        with self.measuring(module) as loss_of:
            try:
                self.begin(trainer, module, loss_of)
            except FloatingPointError as error:  # training has diverged, which is not for a measurement to end
                rank_zero_info(f"{type(self).__name__} measures nothing at step {trainer.global_step}: {error}")
        self.table.write(trainer)

    @contextmanager
    def measuring(self, module: pl.LightningModule) -> Iterator[LossOf]:
        """A function from a batch to its loss, by the clock of the measurement."""
        if module.device.type != "cpu":  # what it still has to do of training is no part of this
            torch.accelerator.synchronize()
        with self.budget.clock(), batch_losses(module) as loss_of:
            yield loss_of

    def _prepare(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> None:
        """Make the plan, draw the sample, and find out before the first step what would end the run at a later one."""
        size = batch_size_of(batch) or 1
        steps = float(self.budget.every or trainer.estimated_stepping_batches)
        if not 0 < steps < math.inf:
            raise ValueError(
                f"{type(self).__name__} spreads its measurements over the run, whose number of steps is not known; "
                "give every=, or the trainer max_steps="
            )
        plan = self.budget.make_plan(
            steps=steps,
            price=self.price(2 if (self.samples or 0) <= size else 3),
            fixed=self.fixed_price(),
            samples=self.samples,
            times=self.times,
            length=self.length,
            micro_batch=size,
            accumulated=trainer.accumulate_grad_batches,
        )
        with batch_losses(module):
            if plan.samples:
                self.evaluation.choose(trainer, module, plan.samples)
            if self.fresh:
                self.evaluation.draw_batches(trainer, module, self.fresh)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    @property
    def key_options(self) -> dict[str, Any]:
        """Several measurements of a kind may stand beside each other, if one of these options differs."""
        path = None if self.table.path is None else str(self.table.path)
        budget = {"every": self.budget.every, "overhead": self.budget.overhead}
        return {"samples": self.samples, **budget, "seed": self.seed, "path": path}

    @property
    def state_key(self) -> str:
        """The name of this measurement in a checkpoint."""
        return self._generate_state_key(**self.key_options)

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, and what they cost."""
        costs = {"gradients": self.budget.gradients, "seconds": self.budget.seconds}
        return {"rows": self.table.rows, "begun": self.table.number, **costs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with saved rows."""
        self.table.rows, self.table.number = state_dict["rows"], state_dict["begun"]
        self.budget.gradients, self.budget.seconds = state_dict["gradients"], state_dict["seconds"]


def trainable(module: pl.LightningModule) -> list[nn.Parameter]:
    """The parameters that train."""
    return [p for p in module.parameters() if p.requires_grad]
