"""What our models share: one evaluation of a batch for training, validation and test, and NSGD as the default."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor

from nsgd import NSGD

Split = Literal["train", "val", "test"]


class Stages(pl.LightningModule, ABC):
    """A module whose steps differ in nothing but the names that they log under."""

    lr: float

    @abstractmethod
    def evaluate(self, batch: Any, stage: Split) -> Tensor:
        """The mean loss of a batch; what is logged has the stage before its name."""

    def log_loss(self, loss: Tensor, stage: Split, size: int) -> None:
        """Log the mean loss of a batch of a size: in training at each step, else over all batches of all processes."""
        in_training = stage == "train"
        self.log(
            f"{stage}_loss",
            loss,
            on_step=in_training,
            on_epoch=not in_training,
            sync_dist=not in_training,
            prog_bar=True,
            batch_size=size,
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The mean loss of the batch."""
        return self.evaluate(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The mean loss of the batch."""
        return self.evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The mean loss of the batch."""
        return self.evaluate(batch, "test")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """NSGD at its defaults."""
        return NSGD(self.parameters(), lr=self.lr)
