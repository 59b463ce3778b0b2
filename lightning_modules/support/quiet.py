"""Lightning without its notes, bars and warnings, where another program's output matters."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers.logger import DummyLogger


def quiet_trainer(**options: Any) -> pl.Trainer:
    """A trainer that writes nothing of its own accord, on the CPU by default; modules find a logger that takes all."""
    return pl.Trainer(
        **{"accelerator": "cpu", **options},
        logger=DummyLogger(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def ignore_lightning_noise() -> None:
    """Silence warnings on worker processes, which slow indexed tensors down, on short runs, and on Lightning's code."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.* is deprecated.*")


@contextmanager
def quiet() -> Iterator[None]:
    """Leave the terminal to the progress bar: none of Lightning's notes on hardware, workers and epochs."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        with warnings.catch_warnings():
            ignore_lightning_noise()
            warnings.filterwarnings("ignore", ".* available but not used.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
