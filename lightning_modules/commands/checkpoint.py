"""What ``--ckpt_path`` means for ``nsgd fit`` and its sisters, checked before anything is done."""

from __future__ import annotations

import os
from typing import Any

import pytorch_lightning as pl

_FOUND_BY_LIGHTNING = ("last", "hpc")


def check_path(path: str | None, command: str) -> None:
    """Check that there is a checkpoint, as far as its path tells.

    Args:
        path: What was given for ``--ckpt_path``.
        command: fit, validate, test or predict.

    Raises:
        ValueError: If there is none.
    """
    if not path and command != "fit":
        raise ValueError(f"expected --ckpt_path, the checkpoint to {command}, got none")
    if path == "best":  # of the training before, in the same process
        raise ValueError(
            "expected --ckpt_path to be a checkpoint file, got 'best', which no command knows of a training before it; "
            "give the path of the file"
        )
    if path and path not in _FOUND_BY_LIGHTNING and "://" not in path and not os.path.exists(path):
        raise ValueError(f"expected --ckpt_path to be a checkpoint file, got {path!r}, which does not exist")


class CheckCheckpoint(pl.Callback):
    """Refuse a checkpoint that was asked for and not found, and one of another optimizer, before a step is made.

    Args:
        path: What was given for ``--ckpt_path``.
        command: fit, validate, test or predict.
    """

    def __init__(self, path: str | None, command: str) -> None:
        self._path, self._command = path, command
        self._saved: list[dict[str, Any]] = []

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what the checkpoint says of its optimizers."""
        self._saved = checkpoint.get("optimizer_states", []) if self._command == "fit" else []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the options of the optimizers, by name, before their state is restored.

        Raises:
            ValueError: If the checkpoint is of another optimizer.
        """
        for optimizer, saved in zip(trainer.optimizers, self._saved, strict=False):
            groups = saved["param_groups"]
            here, there = ({name for group in of for name in group} for of in (optimizer.param_groups, groups))
            # One side has more where torch has added an option since, or directions were added or left out.
            if here - there and there - here:
                raise ValueError(
                    f"expected --ckpt_path to be of a training with {type(optimizer).__name__}, got one of another "
                    f"optimizer: it has {', '.join(sorted(there - here))}, and not {', '.join(sorted(here - there))}; "
                    "give the --optimizer that it was trained with, or another checkpoint"
                )
        self._saved = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse to begin anew where a checkpoint was asked for."""
        self._check(trainer)

    on_validation_start = on_test_start = on_predict_start = on_train_start

    def _check(self, trainer: pl.Trainer) -> None:
        fn = trainer.state.fn
        if self._path and trainer.ckpt_path is None and fn is not None and fn.value == self._command:
            raise ValueError(
                f"expected --ckpt_path to be a checkpoint, got {self._path!r}, and none was found; give the path of "
                "the file, or a ModelCheckpoint with the dirpath and save_last of the training before"
            )
