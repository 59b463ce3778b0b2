"""The quadratic model of a loss around a point, and what SGD's averages do in it (Sandler et al. 2023, 2301.02312)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from nsgd.trajectory.averaging import average_moments, equivalent_schedule


@dataclass(frozen=True)
class LocalModel:
    """A quadratic with one Hessian for every batch: exact along k directions, of one curvature beyond them.

    Numbers have an entry for each direction and one for all the rest, (k + 1,) float64 on the CPU.
    """

    loss: float  # that is measured, at the point
    basis: Tensor  # (k, P), orthonormal
    curvatures: Tensor
    slopes: Tensor  # the gradient of the loss that is measured, times the mean gradient of batches
    squares: Tensor  # of the mean gradient of batches
    noise: Tensor  # variance of a batch's gradient

    def schedule(self, weights: Tensor, *, lr: float) -> Tensor:
        """Rates (k + 1, T) under which the last iterate is the average of SGD at the rate lr."""
        return equivalent_schedule(weights, lr=lr, curvature=self.curvatures)

    def expected_loss(self, weights: Tensor, *, lr: float) -> float:
        """Of the average, over the batches."""
        drift, spread = average_moments(weights, lr=lr, curvature=self.curvatures)
        bend = drift**2 * self.squares + spread * self.noise
        return self.loss + float((self.curvatures / 2 * bend - drift * self.slopes).sum())


def without(basis: Tensor, vector: Tensor) -> Tensor:
    """What a vector (P,) has outside of an orthonormal basis (k, P)."""
    return vector - (basis @ vector) @ basis


def fit_model(
    loss: float, *, basis: Tensor, curvatures: Tensor, gradient: Tensor, gradients: Iterable[Tensor]
) -> LocalModel:
    """The model from the gradients of independent batches at its point.

    Args:
        loss: The one that is measured, at the point.
        basis: Sharp directions, (k, P).
        curvatures: Along them, and of the rest, (k + 1,).
        gradient: Of the loss that is measured, (P,).
        gradients: Of batches, (P,) each, two or more.
    """
    squares = torch.zeros(len(basis) + 1, dtype=torch.float64, device="cpu")
    total, count = torch.zeros_like(gradient), 0
    for other in gradients:
        total, squares, count = total + other, squares + _shares(basis, other, other), count + 1
    mean = total / count
    of_mean = _shares(basis, mean, mean)
    noise = (squares - count * of_mean) / (count - 1)
    # The mean of a few batches has noise of its own, whose square is taken out again; times another gradient it is 0.
    unbiased = of_mean - noise / count
    return LocalModel(loss, basis, curvatures, _shares(basis, gradient, mean), unbiased, noise)


def _shares(basis: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """The product of two vectors, cut into that along each direction and that of the rest, (k + 1,)."""
    along = ((basis @ one) * (basis @ other)).double().cpu()
    return torch.cat([along, torch.dot(one, other).double().cpu()[None] - along.sum()])
