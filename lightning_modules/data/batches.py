"""Batches of indices, shuffled by seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class EpochBatches(Sampler[list[int]]):
    """Batches of indices whose order is a function of the seed and the epoch alone, so that resuming repeats it."""

    def __init__(self, size: int, batch_size: int, *, shuffle: bool, seed: int = 0) -> None:
        self.size, self.batch_size, self.shuffle, self.seed = size, batch_size, shuffle, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        # A short last batch would be a noisier training step than the others; in evaluation every image counts.
        return self.size // self.batch_size if self.shuffle else -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = (
            torch.randperm(self.size, generator=generator, device="cpu")
            if self.shuffle
            else torch.arange(self.size, device="cpu")
        )
        for i in range(len(self)):
            yield order[i * self.batch_size : (i + 1) * self.batch_size].tolist()
