"""The columns of the 2019 paper's table: curvature where runs ended and were best, and how far they went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_modules.models.batch_loss import batch_losses
from lightning_modules.support.quantities import DISTANCE, FROBENIUS, LAMBDA_1
from nsgd.curvature.eigen import top_eigenpairs
from nsgd.curvature.vectors import listed


@dataclass(frozen=True)
class Spectrum:
    """What is measured of the Hessian's spectrum, in evaluation mode and without augmentation.

    Args:
        k: Eigenvalues of largest magnitude; the root of the sum of their squares is what Jastrzębski et al. (2019) call
            the Hessian's Frobenius norm, of 50.
        samples: Training samples that the Hessian is of; the paper's number is 2,560.
    """

    k: int = 50
    samples: int = 2560

    def check(self) -> None:
        """Raise a ValueError for numbers that nothing can be measured with."""
        for name, count in (("k", self.k), ("samples", self.samples)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"expected spectrum.{name} to be a whole number of at least 1, got {count!r}")


def spectrum_columns(
    spectrum: Spectrum, module: pl.LightningModule, samples: Sequence[tuple[Any, int]], start: Sequence[Tensor]
) -> dict[str, float]:
    """Frobenius norm and largest eigenvalue of the Hessian at a module's weights, and their distance from the start.

    Costs some 2k Hessian-vector products on the samples, each as much as two gradients of them. Memory: some 7k vectors
    of parameters.

    Args:
        spectrum: What is measured.
        module: At the weights, in evaluation mode.
        samples: Batches on its device, with their sample counts: ``spectrum.samples`` in all, or what there is.
        start: Its parameters as they were before training.

    Returns:
        NaN where the Hessian is not finite.
    """
    params = [p for p in listed(module.parameters()) if p.requires_grad]
    with batch_losses(module) as loss:
        pairs = [(partial(loss, batch, i), size) for i, (batch, size) in enumerate(samples)]
        k = min(spectrum.k, sum(p.numel() for p in params))
        try:
            values = top_eigenpairs(pairs, params, k=k, which="LM").eigenvalues.double()
            curvature = {FROBENIUS: float(values.square().sum().sqrt()), LAMBDA_1: float(values.max())}
        except FloatingPointError:
            curvature = {FROBENIUS: float("nan"), LAMBDA_1: float("nan")}
    moved = [
        (p.detach().double() - at.to(p.device).double()).square().sum()
        for p, at in zip(module.parameters(), start, strict=True)
    ]
    return {**curvature, DISTANCE: float(torch.stack(moved).sum().sqrt())}
