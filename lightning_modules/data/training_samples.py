"""Samples of the training set of a running trainer, drawn by seed and apart from the training itself."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

from nsgd.curvature.guard import untouched


def training_samples(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    count: int,
    *,
    seed: int,
    parts: Callable[[int], list[slice]],
    otherwise: str,
    share: tuple[int, int] = (0, 1),
) -> list[tuple[Any, int]]:
    """Batches of different samples of the training set on the module's device, with their sample counts.

    Drawn uniformly from the data set, each sample at most once, whatever the loader's sampler is: weights and subsets
    of a sampler have no say. Augmentation is drawn by the same seed. The loader's own order and the random state stay
    as found.

    Args:
        trainer: In ``fit``.
        module: What it trains.
        count: Samples in all; or as many as there are.
        seed: Draws the samples and their augmentation.
        parts: Ranges that so many samples are cut into, one for each batch.
        otherwise: What to do where there is no data set with a length, for the message.
        share: Which of so many equal shares of the samples: those of one process, of several.

    Raises:
        ValueError: If the trainer's loader is no DataLoader over a data set with a length.
    """
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise ValueError(
            "expected a DataLoader over a data set with a length, to draw training samples from, got "
            f"{type(loader).__name__}{_of_a_stream(loader)}; {otherwise}"
        )
    dataset: Any = loader.dataset
    generator = torch.Generator().manual_seed(seed % 2**63)
    chosen = torch.randperm(len(dataset), generator=generator, device="cpu")[:count].tolist()[share[0] :: share[1]]

    def batch_of(indices: list[int]) -> tuple[Any, int]:
        whole = loader.batch_sampler is None  # the data set makes whole batches itself
        batch = dataset[indices] if whole else loader.collate_fn([dataset[i] for i in indices])
        return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch)), len(indices)

    with untouched(device=module.device):  # transforms and augmentation draw random numbers
        seed_generators(seed * share[1] + share[0])
        return [batch_of(chosen[part]) for part in parts(len(chosen))]


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch, on every device, of Python and of NumPy."""
    torch.manual_seed(seed % 2**63)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def in_batches(size: int) -> Callable[[int], list[slice]]:
    """Ranges of at most so many samples each, as equal as they can be: BatchNorm cannot do with one that is left."""

    def parts(count: int) -> list[slice]:
        number = -(-count // size)
        bounds = [round(i * count / number) for i in range(number + 1)]
        return [slice(start, end) for start, end in pairwise(bounds)]

    return parts


def _of_a_stream(loader: Any) -> str:
    return " over an IterableDataset" if isinstance(loader, DataLoader) else ""
