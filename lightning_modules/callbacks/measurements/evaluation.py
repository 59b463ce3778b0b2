"""Losses that a measurement takes: on one sample of the training set, and on fresh training batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_modules.callbacks.measurements.budget import Budget
from lightning_modules.data.training_samples import in_batches, seed_generators, training_samples
from nsgd.curvature.hessian import Closure, Losses
from nsgd.trajectory.quadratic import OwnBatch
from nsgd.trajectory.sharpness import own_batch

LossOf = Callable[[Any, int], Tensor]
Parts = list[tuple[Any, int]]  # batches with their sample counts

FORWARD = 1 / 3  # of a gradient


class EvaluationSample:
    """A sample of the training set, drawn once with its augmentation, and the loss on it.

    It is cut into the same batches each time, none larger than a running batch, and evaluated with the same random
    numbers. Other batches may be given in its place. What it computes is counted.

    Args:
        budget: That counts.
        seed: Draws the samples, and everything random in the loss.
        owner: The measurement's class, for messages.

    Attributes:
        parts: The batches, and how many samples each has; none before :meth:`choose`.
    """

    def __init__(self, *, budget: Budget, seed: int, owner: str) -> None:
        self._budget, self._seed, self._owner = budget, seed, owner
        self.parts: Parts = []

    @property
    def size(self) -> int:
        """Samples in it."""
        return _size(self.parts)

    def choose(self, trainer: pl.Trainer, module: pl.LightningModule, count: int) -> None:
        """Draw the sample that losses are taken on from now on."""
        self.parts = self.draw(trainer, module, count, seed=self._seed)

    def draw(self, trainer: pl.Trainer, module: pl.LightningModule, count: int, *, seed: int) -> Parts:
        """Training samples in batches no larger than a running batch.

        Raises:
            ValueError: If the training set is a stream.
        """
        parts = in_batches(self._budget.micro_batch)
        otherwise = f"take {self._owner} out"
        return training_samples(trainer, module, count, seed=seed, parts=parts, otherwise=otherwise)

    def draw_batches(self, trainer: pl.Trainer, module: pl.LightningModule, count: int) -> Parts:
        """So many training batches, fresh at each optimizer step; none has a sample of another.

        Raises:
            ValueError: If the training set is a stream, or has fewer batches.
        """
        size = self._budget.micro_batch
        batches = self.draw(trainer, module, count * size, seed=self._seed + 1 + trainer.global_step)
        if len(batches) < count or batches[-1][1] < size:
            raise ValueError(
                f"{self._owner} expected a training set of {count} batches or more, got "
                f"{_size(batches)} samples for batches of {size}; lower the batch size"
            )
        return batches

    def loss(self, loss_of: LossOf, parts: Parts | None = None) -> Closure:
        """The mean loss on the sample, or on other batches; its forward passes are counted."""
        parts = self.parts if parts is None else parts
        total = _size(parts)

        def mean() -> Tensor:
            self.spend(FORWARD, parts)
            losses = [self._seeded(loss_of, batch)() * (n / total) for batch, n in parts]
            return torch.stack(losses).sum()

        return mean

    def curvature_loss(self, loss_of: LossOf) -> Closure | Losses:
        """The same for Hessian-vector products, whose cost the caller counts: one graph, or one for each batch."""
        pairs = [(self._seeded(loss_of, batch), n) for batch, n in self.parts]
        return pairs[0][0] if len(pairs) == 1 else pairs

    def along_gradient(self, loss_of: LossOf, batch: Parts, params: list[nn.Parameter]) -> tuple[Tensor, OwnBatch]:
        """A batch's gradient (P,), and its loss as a quadratic along it; counted."""
        along = own_batch(self.loss(loss_of, batch), params)
        self.spend(3 - FORWARD, batch)  # the forward pass is counted
        return along

    def spend(self, gradients: float, parts: Parts | None = None) -> None:
        """Count work on the sample, or on other batches, in gradients of these."""
        self._budget.spend(gradients, samples=_size(self.parts if parts is None else parts))

    def _seeded(self, loss_of: LossOf, batch: Any) -> Closure:
        """The loss of a batch with the same dropout masks each time."""

        def loss() -> Tensor:
            seed_generators(self._seed)
            return loss_of(batch, 0)

        return loss


def _size(parts: Parts) -> int:
    return sum(n for _, n in parts)
