"""RecordSteps: what one run did, step by step, against the three axes of cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl

from lightning_modules.callbacks.measurements.measurement import Measurement
from nsgd.damping.step import Damped


class RecordSteps(pl.Callback):
    """Keep one row for each optimizer step: loss, cumulative gradients and seconds; validation and refreshes beside.

    Gradients are forward and backward passes on a training batch: one a step, or as many as the module's
    ``gradients_per_step``, and what refreshes cost. Seconds are those of training with its refreshes, without
    validation and measurements.

    Args:
        on_step: Called with the step and its loss after each.
        scores: What is noted of a validation, by the names that the module logs them under.
        measurements: Callbacks whose seconds are left out; they come before this one in the trainer's list.
    """

    def __init__(
        self,
        on_step: Callable[[int, float], None],
        scores: Sequence[str] = (),
        measurements: Sequence[Measurement] = (),
    ) -> None:
        self._scores, self._measurements = scores, measurements
        self.rows: list[dict[str, Any]] = []
        self._on_step = on_step
        self.validating = 0.0  # seconds
        self._passes = 0
        self._began = 0.0
        self._paused_at = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the pass."""
        self._passes += 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the step."""
        # A training_step may pass a batch over, and has no loss then.
        step, loss = trainer.global_step, float(outputs["loss"]) if outputs and "loss" in outputs else math.nan
        optimizer = trainer.optimizers[0]
        row: dict[str, Any] = {"step": step, "epoch": trainer.current_epoch, "loss": loss}
        refreshes = optimizer.refreshes if isinstance(optimizer, Damped) else 0
        # SAM takes two a step, and says so; optimizers that call the closure again, such as L-BFGS, take more passes.
        taken = max(step * getattr(pl_module, "gradients_per_step", 1), self._passes)
        row["gradients"] = taken + (optimizer.cost_gradients if isinstance(optimizer, Damped) else 0.0)
        row["seconds"] = time.perf_counter() - self._began - sum(m.seconds for m in self._measurements)
        row |= {"refreshes": refreshes, "hvps": optimizer.hvps if isinstance(optimizer, Damped) else 0}
        if isinstance(optimizer, Damped):
            row["alignment"] = optimizer.alignment
            if refreshes > (self.rows[-1]["refreshes"] if self.rows else 0):
                row["overlap"] = optimizer.overlap
                row |= {f"weight_{i}": value for i, value in enumerate(optimizer.weights, start=1)}
        self.rows.append(row)
        self._on_step(step, loss)
        if step == trainer.max_steps:
            trainer.should_stop = True  # and so validate after the last step, where it ends within an epoch

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the validation results on the last step's row, and let the clock go on."""
        spent = time.perf_counter() - self._paused_at
        self._began += spent
        self.validating += spent
        for name in self._scores:
            if self.rows and name in trainer.callback_metrics:
                self.rows[-1][name] = float(trainer.callback_metrics[name])
