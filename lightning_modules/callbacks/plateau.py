"""ReduceOnPlateau: a learning rate that falls where validation stands still."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_modules.support.score import Mode, Score

FACTOR = 0.1  # on the rate, where it falls


class ReduceOnPlateau(pl.Callback):
    """Divide the learning rate by ten after so many validations in a row without a better loss than the best before.

    It goes by the validation loss, or by the score of a study where none is logged, by torch's ReduceLROnPlateau.
    Lightning would step that after the last hook of an epoch, where checkpoints are written already, and not at all
    with manual optimization; as a callback its state is in them. Costs nothing.

    Args:
        patience: Validations, at least 1.
        score: What the study compares.

    Raises:
        ValueError: If the patience is not above 0.
    """

    def __init__(self, patience: int, score: Score) -> None:
        if patience < 1:
            raise ValueError(f"expected patience to be a number of validations of at least 1, got {patience}")
        self.patience, self._score = patience, score
        self._schedulers: list[ReduceLROnPlateau] = []
        self._resumed: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Of its schedulers: what was best, and how long ago."""
        return {"schedulers": [scheduler.state_dict() for scheduler in self._schedulers] or self._resumed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what a resumed training goes on with."""
        self._resumed = state_dict["schedulers"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin, or go on."""
        self._schedulers = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look whether it was better."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        by = self._score.criterion(trainer.callback_metrics)
        if not self._schedulers:
            mode: Mode = "min" if by.lower_is_better else "max"
            options: dict[str, Any] = {"factor": FACTOR, "patience": self.patience - 1, "threshold": 0.0}
            self._schedulers = [ReduceLROnPlateau(optimizer, mode, **options) for optimizer in trainer.optimizers]
            for scheduler, state in zip(self._schedulers, self._resumed, strict=False):
                scheduler.load_state_dict(state)
            self._resumed = []
        for scheduler in self._schedulers:
            scheduler.step(float(trainer.callback_metrics[by.column]))
