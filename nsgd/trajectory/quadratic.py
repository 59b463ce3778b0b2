"""The loss of one mini-batch as a quadratic along its own gradient (Sandler et al. 2023, arXiv 2301.02312).

A batch's own loss falls far in one step at a rate much above that of training; on a batch that the step has not seen
the best rate is another. In the paper's model, l_b(theta) = (theta - c_b)^T H (theta - c_b) / 2 with minima c_b that
scatter with variance s^2 around their mean, the first is the inverse Rayleigh quotient of the gradient, the second
lr / 2 for every curvature once SGD at the rate lr is stationary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from nsgd.curvature.checks import check_vectors, of_their_kind


@dataclass(frozen=True)
class OwnBatch:
    """A batch's loss along its own gradient: l(theta - rate g) = l - rate |g|^2 + rate^2 g^T H g / 2."""

    loss: float
    squared_gradient: float  # |g|^2
    curvature: float  # g^T H g, one Hessian-vector product

    @property
    def best_rate(self) -> float:
        """|g|^2 / g^T H g, where the batch's own loss is least; infinite without positive curvature."""
        return self.squared_gradient / self.curvature if self.curvature > 0 else math.inf

    @property
    def best_loss(self) -> float:
        """The loss there, l - |g|^4 / (2 g^T H g)."""
        return (
            self.loss - self.squared_gradient * self.squared_gradient / (2 * self.curvature)
            if self.curvature > 0
            else -math.inf
        )

    @property
    def sharpness(self) -> float:
        """g^T H g / |g|^2, whose mean over batches is the batch sharpness; NaN without a gradient."""
        return self.curvature / self.squared_gradient if self.squared_gradient > 0 else math.nan

    def predicted(self, rates: Tensor) -> Tensor:
        """Losses after a step at each of these rates, (n,)."""
        rates = rates.double()
        return self.loss - rates * self.squared_gradient + rates**2 * (self.curvature / 2)


@of_their_kind
def r_squared(measured: Tensor, predicted: Tensor) -> float:
    """Share of the variance of measured losses (n,) that a prediction explains; NaN where they do not vary."""
    check_vectors(measured=measured, predicted=predicted)
    measured, predicted = measured.double(), predicted.double()
    total = (measured - measured.mean()).square().sum()
    return float(1 - (measured - predicted).square().sum() / total) if total > 0 else math.nan


@of_their_kind
def held_out_loss(rates: Tensor, *, curvature: float, variance: float, noise: float) -> Tensor:
    """Mean loss of an unseen batch after one step at each rate, (n,), along a direction of the model.

        h ((1 - rate h)^2 z^2 + rate^2 h^2 s^2 + s^2) / 2

    Args:
        rates: (n,).
        curvature: h.
        variance: z^2, of the iterate around the mean of the minima.
        noise: s^2, of the batches' minima around their mean.
    """
    pace = rates.double() * curvature
    return curvature / 2 * ((1 - pace) ** 2 * variance + pace**2 * noise + noise)


@of_their_kind
def held_out_rate(*, curvature: float, variance: float, noise: float) -> float:
    """Best rate for an unseen batch, z^2 / (z^2 + s^2) / h; it breaks even at twice that.

    At stationarity of SGD at a constant rate (:func:`nsgd.trajectory.averaging.stationary_variance`) it is lr / 2 for
    every curvature.

    Args:
        curvature: h.
        variance: z^2, of the iterate around the mean of the minima.
        noise: s^2, of the batches' minima around their mean.
    """
    if not curvature > 0 or not variance >= 0 or not noise >= 0 or not variance + noise > 0:
        raise ValueError(
            "expected curvature above 0, and variance and noise of at least 0, one of them above, got "
            f"{curvature}, {variance} and {noise}"
        )
    return variance / (variance + noise) / curvature
