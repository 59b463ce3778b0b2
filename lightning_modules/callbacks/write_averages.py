"""WriteAverages: the averages of a run as checkpoints, one for each read-out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import nn

from lightning_modules.averages import ReadOuts
from lightning_modules.paths import unused
from lightning_modules.training_samples import in_batches, training_samples


class WriteAverages(ReadOuts):
    """Gather averages of the weights while a module trains, and write each as a checkpoint at the end.

    ``averages/last.ckpt``, ``ema.ckpt``, ``swa.ckpt`` and ``two-point.ckpt`` in the logger's folder, or in
    ``default_root_dir``, are what ``Trainer.validate``, ``test`` and ``predict`` take as ``ckpt_path``; an average that
    never began has no file. Training and the weights that it ends with stay bit-identical. BatchNorm statistics of each
    come from one sample of the training set, in batches of at most 128, which the module's ``forward`` has to take.

    Args:
        ema_decay: Decay of the exponential moving average, updated every step; (1 + t) / (10 + t) while that is less.
        swa_share: Share of the steps, at the end, that the uniform average (SWA) runs over, step by step.
        two_point_share: Distance of the two averaged points, as a share of all steps; the second is the last.
        calibration: Training samples that BatchNorm statistics are taken from; without BatchNorm none are drawn.

    Raises:
        ValueError: If an option is out of range; when training starts, if there is BatchNorm, and no data set with a
            length to draw samples from, or a ``forward`` that does not take them.
    """

    def __init__(
        self,
        ema_decay: float = 0.99,
        swa_share: float = 0.25,
        two_point_share: float = 0.1,
        calibration: int = 2560,
    ) -> None:
        super().__init__(ema_decay, swa_share, two_point_share)
        if calibration < 2:
            raise ValueError(f"expected calibration of at least 2 samples, got {calibration}")
        self.calibration = calibration
        self.paths: dict[str, Path] = {}  # read-out to its checkpoint

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check, before anything is trained, that BatchNorm statistics can be taken."""
        super().on_train_start(trainer, pl_module)
        batches = self._batches(trainer, pl_module, 2)
        if batches is None:
            return
        try:
            with self.applied("last", pl_module, batches):
                pass
        except Exception as error:  # of any kind: a forward may hold anything
            raise ValueError(
                "WriteAverages expected the module to run on the first part of a batch, module(batch[0]), for the "
                f"statistics of BatchNorm, got {type(error).__name__}: {error}; give the module a "
                "forward that takes it, or take WriteAverages out"
            ) from error

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the checkpoints."""
        folder = trainer.strategy.broadcast(unused(Path(trainer.log_dir or trainer.default_root_dir) / "averages"))
        batches = self._batches(trainer, pl_module, self.calibration)
        for name in self.available:
            path = folder / f"{name}.ckpt"
            with self.applied(name, pl_module, batches):
                trainer.save_checkpoint(path, weights_only=True)
            self.paths[name] = path

    def _batches(self, trainer: pl.Trainer, module: pl.LightningModule, count: int) -> list[Any] | None:
        """Training samples for BatchNorm statistics, the same for each read-out; None without BatchNorm."""
        if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
            return None
        otherwise = "take WriteAverages out"
        parts = in_batches(128)
        return [b for b, _ in training_samples(trainer, module, count, seed=0, parts=parts, otherwise=otherwise)]
