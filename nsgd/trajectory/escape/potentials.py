"""Potentials with a sharp and a flat minimum, in one dimension and in two, to try escapes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nsgd.curvature.checks import above_zero, at_least_zero, shown

Potential = Callable[[NDArray[np.float64]], NDArray[np.float64]]  # (n,) -> (n,)
Numbers = TypeVar("Numbers", NDArray[np.float64], Tensor)


@dataclass(frozen=True)
class DoubleWell:
    """Two minima of depth 0 with one barrier between them, the left one sharp and the right one flat.

        f(x) = barrier (u^2 - 1)^2,    u(x) = x - skew (sqrt(1 + x^2) - 1)

    Curvatures at the minima are 8 barrier u'(x)^2, at the saddle, x = 0, it is -4 barrier.

    Args:
        barrier: Height of the saddle above the minima, above 0.
        skew: From 0, minima alike, to below 1, the left one ever sharper.
    """

    barrier: float = 1.0
    skew: float = 0.3

    def __post_init__(self) -> None:
        object.__setattr__(self, "barrier", above_zero("barrier", self.barrier))
        object.__setattr__(self, "skew", at_least_zero("skew", self.skew))
        if not self.skew < 1:
            raise ValueError(f"expected a skew in [0, 1), got {self.skew:g}")

    def __call__(self, x: Numbers) -> Numbers:
        """The potential, shaped like x, an array or a tensor."""
        return self.barrier * (self._u(x) ** 2 - 1) ** 2

    def gradient(self, x: Tensor) -> Tensor:
        """Its derivative, shaped like x."""
        root = (1 + x * x).sqrt()
        u = x - self.skew * (root - 1)
        return 4 * self.barrier * (u * u - 1) * u * (1 - self.skew * x / root)

    def _u(self, x: Numbers) -> Numbers:
        return x - self.skew * ((1 + x * x) ** 0.5 - 1)

    @property
    def minima(self) -> tuple[float, float]:
        """The sharp and the flat minimum, left and right of the saddle at 0: where u is -1 and 1."""
        return self._where(-1.0), self._where(1.0)

    def _where(self, u: float) -> float:
        # x - c = skew sqrt(1 + x^2) with c = u - skew, squared: of the two roots the one above c.
        c, s = u - self.skew, self.skew
        return (c + math.sqrt(c * c - (1 - s * s) * (c * c - s * s))) / (1 - s * s)

    def curvature(self, x: float) -> float:
        """Its second derivative."""
        slope = 1 - self.skew * x / math.sqrt(1 + x * x)
        u = float(self._u(np.asarray(x)))
        bend = -self.skew / math.pow(1 + x * x, 1.5)
        return 4 * self.barrier * ((3 * u * u - 1) * slope**2 + (u * u - 1) * u * bend)


@dataclass(frozen=True)
class Channel:
    """A double well along x, in two dimensions, with walls across that are steeper where the well is sharper.

        f(x, y) = well(x) + h(x) y^2 / 2,    h(x) = walls u'(x)^2    (u as in DoubleWell, u'(0) = 1)

    The minima and the saddle are those of the well, at y = 0, and the Hessians there are diagonal.

    Args:
        well: Along x.
        walls: Curvature across at the saddle, above 0.
    """

    well: DoubleWell = DoubleWell()
    walls: float = 40.0

    def __post_init__(self) -> None:
        if not isinstance(self.well, DoubleWell):
            raise ValueError(f"expected well to be a DoubleWell, got {shown(self.well)}")
        object.__setattr__(self, "walls", above_zero("walls", self.walls))

    def __call__(self, position: Tensor) -> Tensor:
        """The potential, (n, 2) to (n,)."""
        x, y = position[:, 0], position[:, 1]
        return self.well(x) + self.across(x) * y * y / 2

    def gradient(self, position: Tensor) -> Tensor:
        """Its gradient, (n, 2) to (n, 2)."""
        x, y = position[:, 0], position[:, 1]
        bend = -self.well.skew / (1 + x * x) ** 1.5  # u''
        pull = self.walls * self._slope(x) * y
        return torch.stack((self.well.gradient(x) + pull * bend * y, pull * self._slope(x)), dim=1)

    def across(self, x: Numbers) -> Numbers:
        """Curvature h across, shaped like x."""
        return self.walls * self._slope(x) ** 2

    def _slope(self, x: Numbers) -> Numbers:
        return 1 - self.well.skew * x / (1 + x * x) ** 0.5

    def marginal(self, *, temperature: float, rate: float = 0.0) -> Potential:
        """The potential that drives x when y, which is faster, is averaged out: a potential of x alone.

            well(x) + T_y / 2 log(h / (1 - rate h / 2)),    since SGD has mean y^2 = T_y / (h (1 - rate h / 2))

        It holds for walls that are steep beside the well; for rate 0 it is the marginal of exp(-f / T).

        Args:
            temperature: Of y, T_y: gamma times that of x where NSGD scales its steps by gamma.
            rate: Step of y, likewise; below 2 / h. For 0 it is the diffusion's.
        """

        def potential(x: NDArray[np.float64]) -> NDArray[np.float64]:
            h = self.across(x)
            return self.well(x) + temperature / 2 * (np.log(h) - np.log1p(-rate * h / 2))

        return potential

    def mean_loss(self, *, temperature: float, rate: float = 0.0) -> Potential:
        """Mean of f over y at each x, with the arguments of ``marginal``."""
        return lambda x: self.well(x) + temperature / 2 / (1 - rate * self.across(x) / 2)
