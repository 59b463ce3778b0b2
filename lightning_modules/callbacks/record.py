"""RecordSteps: what one run did, step by step, against the three axes of cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_modules.callbacks.measurements.measurement import Measurement
from lightning_modules.callbacks.stopwatch import Stopwatch
from nsgd.damping.step import Damped

_READ_AFTER = 1.0  # seconds, after which a device that works on by itself is asked how far it is


class RecordSteps(pl.Callback):
    """Keep one row for each optimizer step: loss, cumulative gradients and seconds; validation and refreshes beside.

    Gradients are forward and backward passes on a training batch: one a step, or as many as the module's
    ``gradients_per_step``, and what refreshes cost. Seconds are those of training with its refreshes, without
    validation, measurements, and what other callbacks do in :meth:`apart`.

    On the CPU every row is whole at once. Elsewhere no step waits for the device, but for one with a refresh from
    samples or products, whose outcome is counted: losses and seconds are read at validations, at the end, and about
    once a second; what the directions are like at validations and at the end alone.

    Args:
        on_step: Called with the last step and its loss, whenever that is read.
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
        self._unread: list[tuple[dict[str, Any], Any]] = []  # rows with the device's loss, and marks of the watch
        self._on_step = on_step
        self.validating, self.validations = 0.0, 0  # seconds, and how often
        self._passes = 0
        self._watch = Stopwatch(torch.device("cpu"))
        self._waits = True
        self._read_at = self._paused_at = 0.0
        self._described = 0  # refreshes of which there is a row
        self._before = 0.0  # seconds that a training which goes on had taken

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Around what is no part of training, in the hooks of other callbacks."""
        with self._watch.paused():
            yield

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._waits = pl_module.device.type == "cpu"
        self._watch, self._read_at = Stopwatch(pl_module.device), time.perf_counter()
        self._before = self.rows[-1]["seconds"] if self.rows else 0.0

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the pass."""
        self._passes += 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the step."""
        mark = self._watch.mark()
        # A training_step may pass a batch over, and has no loss then.
        step, loss = trainer.global_step, outputs["loss"].detach() if outputs and "loss" in outputs else math.nan
        optimizer = trainer.optimizers[0]
        row: dict[str, Any] = {"step": step, "epoch": trainer.current_epoch, "loss": loss}
        # SAM takes two a step, and says so; optimizers that call the closure again, such as L-BFGS, take more passes.
        taken = max(step * getattr(pl_module, "gradients_per_step", 1), self._passes)
        row["gradients"] = taken + (optimizer.cost_gradients if isinstance(optimizer, Damped) else 0.0)
        # Those of the watch come to it once they are read.
        row["seconds"] = self._before - sum(m.seconds for m in self._measurements)
        row["refreshes"] = optimizer.refreshes if isinstance(optimizer, Damped) else 0
        row["hvps"] = optimizer.hvps if isinstance(optimizer, Damped) else 0
        self.rows.append(row)
        self._unread.append((row, mark))
        if self._waits:
            self._describe(optimizer)
        if self._waits or time.perf_counter() - self._read_at > _READ_AFTER:
            self._read()
        if step == trainer.max_steps:
            trainer.should_stop = True  # and so validate after the last step, where it ends within an epoch

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, and what the next ones are counted from."""
        counts = {"passes": self._passes, "described": self._described}
        validated = {"validating": self.validating, "validations": self.validations}
        return {"rows": [dict(row) for row in self.rows], **counts, **validated}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on after saved rows."""
        self.rows = [dict(row) for row in state_dict["rows"]]
        self._passes, self._described = state_dict["passes"], state_dict["described"]
        self.validating, self.validations = state_dict["validating"], state_dict.get("validations", 0)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._watch.pause()
        self._catch_up(trainer)
        self._paused_at = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note the validation results on the last step's row, and let the clock go on."""
        for name in self._scores:
            if self.rows and name in trainer.callback_metrics:
                self.rows[-1][name] = float(trainer.callback_metrics[name])
        self.validating += time.perf_counter() - self._paused_at
        self.validations += 1
        self._watch.resume()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read what is left."""
        self._catch_up(trainer)

    def _catch_up(self, trainer: pl.Trainer) -> None:
        if self.rows and "alignment" not in self.rows[-1]:  # though its loss may have been read already
            self._describe(trainer.optimizers[0])
        if self._unread:
            self._read()

    def _describe(self, optimizer: torch.optim.Optimizer) -> None:
        """Note on the last row what the directions are like, which waits for the device."""
        if not isinstance(optimizer, Damped):
            return
        row = self.rows[-1]
        row["alignment"] = optimizer.alignment
        if row["refreshes"] > self._described:
            self._described = row["refreshes"]
            row["overlap"] = optimizer.overlap
            row |= {f"weight_{i}": value for i, value in enumerate(optimizer.weights, start=1)}

    def _read(self) -> None:
        """Make the rows so far whole, which waits for the device once."""
        losses = [row["loss"].reshape(()) for row, _ in self._unread if isinstance(row["loss"], Tensor)]
        values = iter(torch.stack(losses).tolist() if losses else [])
        for row, mark in self._unread:
            row["loss"] = next(values) if isinstance(row["loss"], Tensor) else row["loss"]
            row["seconds"] += self._watch.seconds(mark)
        self._unread.clear()
        self._read_at = time.perf_counter()
        self._on_step(self.rows[-1]["step"], self.rows[-1]["loss"])
