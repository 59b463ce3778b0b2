"""The batches that RefreshDirections takes the curvature of: cuts of the running batch, or of the training set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_modules.data.cutting import batch_size_of, is_cuttable, samples_first, some_samples
from lightning_modules.data.training_samples import in_batches, training_samples
from nsgd.curvature.checks import count_or_none
from nsgd.damping.step import Damped
from nsgd.directions.batch_dim import BatchDim, check_batch_dim
from nsgd.options import Estimator

_MOST_GROUPS = 64

Parts = list[tuple[Any, int]]  # batches, with their sample counts

WAYS_OUT = (
    "batch_dim of RefreshDirections says which dimension counts samples, and source='train' takes samples of the "
    "training set"
)


@dataclass(frozen=True)
class CurvatureBatches:
    """The choice of samples that the directions come from, and of their groups; as in ``RefreshDirections``.

    Raises:
        ValueError: If an option is out of range.
    """

    samples: int | None
    group_size: int | None
    source: Literal["batch", "train"]
    seed: int
    batch_dim: BatchDim = 0

    def __post_init__(self) -> None:
        check_batch_dim(self.batch_dim)
        for name in ("samples", "group_size"):  # by which the class is frozen to others
            object.__setattr__(self, name, count_or_none(name, getattr(self, name)))
        if self.source not in ("batch", "train"):
            raise ValueError(f"expected source to be batch or train, got {self.source!r}")

    def parts(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        optimizer: Damped,
        batch: Any,
        tell: Callable[[str], None],
    ) -> Parts | None:
        """Batches to take the curvature of, with their sample counts: none for the running loss, None to pass over.

        Where ``batch_dim`` is not 0 their samples lie along the first dimension all the same.

        Args:
            trainer: In ``fit``.
            module: What it trains.
            optimizer: Whose directions they are for.
            batch: The running batch.
            tell: Called where single samples cannot be had, with the reason.

        Raises:
            ValueError: If the training set is to be sampled, and cannot be; the batch has no such ``batch_dim``; or it
                cannot be cut into samples, and the solver takes nothing else.
        """
        batch, _ = samples_first(batch, self.batch_dim)
        size = batch_size_of(batch)
        solver = optimizer.options.solver
        in_groups = solver in ("auto", "gradients")
        if self.source == "train":
            if size is None:
                raise ValueError(
                    f"source='train' expected batches of tensors, got a {type(batch).__name__}; use source='batch'"
                )
            return self._training_sample(trainer, module, None if in_groups else size)
        if not (module.automatic_optimization or hasattr(module, "curvature_loss")):
            return []
        if not in_groups:
            samples = self._share(trainer, module)
            if samples is None or size is None or samples >= size:
                return []
            return [(some_samples(batch, slice(samples)), samples)]
        if size is None or not is_cuttable(batch):
            if solver == "gradients":
                raise ValueError(f"solver='gradients' expected a batch that can be cut into samples; {WAYS_OUT}")
            tell(
                "RefreshDirections cannot cut this batch into samples, so the directions come from Hessian-vector "
                "products of its whole loss, which cost more; solver='lanczos' on the optimizer says that this is "
                f"meant, {WAYS_OUT}"
            )
            return []
        count = min(self._share(trainer, module) or size, size)
        ranges = self._groups(module, count)
        if len(ranges) == 1 and (solver == "gradients" or follows_samples(optimizer)):
            return None  # a short last batch: its products would drive out the average, and the next batch has groups
        if len(ranges) == 1 and count == size:
            tell(
                f"RefreshDirections cannot cut a batch of {size} into groups of samples, so the directions come from "
                "Hessian-vector products of its loss, which cost more; source='train' takes samples of the training set"
            )
            return []
        return [(some_samples(batch, part), part.stop - part.start) for part in ranges]

    def check(self, solvers: list[Estimator], module: nn.Module) -> None:
        """Raise a ValueError where gradients of groups are wanted and the samples make no two groups."""
        if "gradients" in solvers and self.samples is not None and len(self._groups(module, self.samples)) < 2:
            raise ValueError(
                f"solver='gradients' expected samples of two groups or more, got samples={self.samples}; raise it, or "
                "lower group_size"
            )

    def _share(self, trainer: pl.Trainer, module: nn.Module) -> int | None:
        """Samples of this process: two groups at least, or all where these are fewer."""
        if self.samples is None:
            return None
        return max(-(-self.samples // trainer.world_size), min(self.samples, 2 * self._least(module)))

    def _least(self, module: nn.Module) -> int:
        """Samples in a group, unless they are many."""
        return self.group_size or (8 if _is_normalised(module) else 1)

    def _groups(self, module: nn.Module, count: int) -> list[slice]:
        """Cut so many samples into groups."""
        normalised = _is_normalised(module)
        # Every gradient is kept until all are there, so that many samples come in larger groups.
        step = max(self._least(module), -(-count // _MOST_GROUPS))
        starts = list(range(0, count, step))
        if normalised and len(starts) > 1 and count - starts[-1] == 1:
            starts.pop()  # BatchNorm cannot do with one sample: the last group takes it in
        return [slice(start, end) for start, end in pairwise([*starts, count])]

    def _training_sample(self, trainer: pl.Trainer, module: pl.LightningModule, size: int | None) -> Parts:
        """Fresh samples of the training set in batches of a size, or in groups, with their sample counts."""
        drawn = training_samples(
            trainer,
            module,
            self.samples or 2560,
            # A function of the step, so that a resumed run draws the samples that an uninterrupted one does.
            seed=self.seed * 1_000_003 + trainer.global_step,
            parts=partial(self._groups, module) if size is None else in_batches(size),
            otherwise="use source='batch'",
            share=(trainer.global_rank, trainer.world_size),
        )
        return [(samples_first(batch, self.batch_dim)[0], n) for batch, n in drawn]


def _is_normalised(module: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


def follows_samples(optimizer: Damped) -> bool:
    """Whether the directions are an average of samples' gradients, which products would drive out."""
    return bool(not optimizer.from_training_gradients and optimizer.weights and not optimizer.eigenvalues)


def columns_of(parts: Parts) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]] | None:
    """Batches end to end: their tensors, and a function from tensors to a batch; None if they are not of one make."""
    sizes = [n for _, n in parts]
    flat = [tree_flatten(batch) for batch, _ in parts]
    spec = flat[0][1]
    if any(other != spec for _, other in flat) or set(sizes[:-1]) != {sizes[0]} or sizes[-1] > sizes[0]:
        return None
    columns = list(zip(*(leaves for leaves, _ in flat), strict=True))
    if not all(_is_column(column, sizes) for column in columns):
        return None
    return [torch.cat(column) for column in columns], lambda tensors: tree_unflatten(list(tensors), spec)


def _is_column(parts: Sequence[Any], sizes: list[int]) -> bool:
    """Whether these are tensors of so many rows of one shape."""
    return all(
        isinstance(part, Tensor) and part.ndim > 0 and len(part) == n and part.shape[1:] == parts[0].shape[1:]
        for part, n in zip(parts, sizes, strict=True)
    )
