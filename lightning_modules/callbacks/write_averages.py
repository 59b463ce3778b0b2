"""WriteAverages: the averages of a run as checkpoints, one for each read-out."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl

from lightning_modules.callbacks.averages import ReadOuts, calibration_batches
from lightning_modules.support.files import unused

_OTHERWISE = "take WriteAverages out"


class WriteAverages(ReadOuts):
    """Gather averages of the weights while a module trains, and write each as a checkpoint at the end.

    ``averages/last.ckpt``, ``ema.ckpt``, ``swa.ckpt`` and ``two-point.ckpt`` in the logger's folder, or in
    ``default_root_dir``, are what ``Trainer.validate``, ``test`` and ``predict`` take as ``ckpt_path``; an average that
    never began has no file. Training and the weights that it ends with stay bit-identical. BatchNorm statistics of each
    come from one sample of the training set, in batches of at most 128, by the module's own training loss.

    Args:
        ema_decay: Decay of the exponential moving average, updated every step; (1 + t) / (10 + t) while that is less.
        swa_share: Share of the steps, at the end, that the uniform average (SWA) runs over, step by step.
        two_point_share: Distance of the two averaged points, as a share of all steps; the second is the last.
        calibration: Training samples that BatchNorm statistics are taken from; without BatchNorm none are drawn.

    Raises:
        ValueError: If an option is out of range; when training starts, if there is BatchNorm, and no data set with a
            length to draw samples from, or a training loss that does not take them.
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
        batches = calibration_batches(trainer, pl_module, 2, otherwise=_OTHERWISE)
        if batches is None:
            return
        try:
            with self.applied("last", pl_module, batches):
                pass
        except Exception as error:  # of any kind: a training_step may hold anything
            raise ValueError(
                "WriteAverages expected the module to have a training loss for two samples of its training set, for "
                f"the statistics of BatchNorm, got {type(error).__name__}: {error}; {_OTHERWISE}"
            ) from error

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the checkpoints."""
        folder = trainer.strategy.broadcast(unused(Path(trainer.log_dir or trainer.default_root_dir) / "averages"))
        batches = calibration_batches(trainer, pl_module, self.calibration, otherwise=_OTHERWISE)
        for name in self.available:
            path = folder / f"{name}.ckpt"
            with self.applied(name, pl_module, batches):
                trainer.save_checkpoint(path, weights_only=True)
            self.paths[name] = path
