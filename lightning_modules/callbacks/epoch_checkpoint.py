"""EpochCheckpoint: a run that was interrupted goes on from the end of an epoch, to the same numbers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from lightning_modules.support.whole_files import write_with
from nsgd.curvature.guard import RandomState

EVERY = 30.0  # seconds between two checkpoints, at least: what takes less is as soon made again


class EpochCheckpoint(pl.Callback):
    """Keep one checkpoint of a training with everything that it goes on from, random state included.

    It is written at the end of an epoch, and not in the last one; it stands last among the callbacks, whose states it
    holds.

    Args:
        path: Its file.
        about: What the training goes by; a checkpoint of another is passed over.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self._about = path, dict(about)
        self._written = time.monotonic()
        self._device = torch.device("cpu")
        self._random_state: dict[str, Any] | None = None  # that a resumed training begins with

    def found(self) -> Path | None:
        """The checkpoint to go on from, to be given to ``Trainer.fit``; None where there is none of this training.

        Raises:
            ValueError: If the file cannot be read as one.
        """
        if not self.path.exists():
            return None
        try:
            held = torch.load(self.path, weights_only=True, map_location="cpu")
            about = held["callbacks"][self.state_key]["about"]
        except Exception as error:  # of a file that is cut there are many kinds
            raise ValueError(
                f"expected a checkpoint in {self.path}, got a file that cannot be read as one; remove it, and the same "
                "command makes that run from its beginning"
            ) from error
        return self.path if about == self._about else None

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint is of, and the random state."""
        return {"about": self._about, "random_state": _random_state(self._device)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the random state that training goes on with."""
        self._random_state = state_dict["random_state"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go back to the random state of the checkpoint, once."""
        self._device = pl_module.device
        if self._random_state is not None:
            _restore(self._random_state, self._device)
            torch.empty((), dtype=torch.int64).random_()  # as a loader does that begins an epoch: here it has
            self._random_state = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the checkpoint, where the last one is old enough."""
        if trainer.global_step < trainer.max_steps and time.monotonic() - self._written >= EVERY:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint()
            _end_epoch(checkpoint["loops"]["fit_loop"])
            write_with(self.path, lambda file: torch.save(checkpoint, file))
            self._written = time.monotonic()


def _end_epoch(loop: dict[str, Any]) -> None:
    """Have the counts of a loop say that an epoch is over, which they do not yet where its last hooks are called.

    With ``max_steps`` Lightning would take the next epoch for over as well.
    """
    for progress in loop["epoch_progress"].values():
        progress["completed"] = progress["processed"]
    batches = loop["epoch_loop.batch_progress"]
    batches["is_last_batch"] = False
    batches["current"] = dict.fromkeys(batches["current"], 0)


def _random_state(device: torch.device) -> dict[str, Any]:
    """That of Python, NumPy and torch, there and on a device, in plain values and tensors."""
    found = RandomState(device)
    python, (kind, keys, *rest), cpu = found.states
    numpy = (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
    return {"python": python, "numpy": numpy, "torch": cpu, "device": found.accelerator_state}


def _restore(state: Mapping[str, Any], device: torch.device) -> None:
    version, words, gauss = state["python"]
    kind, keys, *rest = state["numpy"]
    numpy: Any = (kind, keys.numpy().astype(np.uint32), *rest)  # NumPy types it as a dictionary
    saved = RandomState(device)
    saved.states = ((version, tuple(words), gauss), numpy, state["torch"])
    saved.accelerator_state = state["device"]
    saved.restore()
