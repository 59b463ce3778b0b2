"""How long SGD takes to leave a minimum, and where it spends its time (Dai & Zhu 2018, arXiv 1812.00542).

SGD with gradient noise of variance sigma^2 / B in every coordinate, theta <- theta - lr (grad f + sigma / sqrt(B) xi),
is for small lr the diffusion d theta = -grad f dt + sqrt(2 T) dW at the temperature T = lr sigma^2 / (2 B), with one
step for every lr of its time. To leave a minimum is to reach the other one: the way to the saddle takes half as long.

The formulas hold for noise that is the same everywhere and for minima that are not degenerate; the one-dimensional time
is exact for the diffusion, the simulation is SGD itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import cumulative_simpson, simpson
from torch import Tensor

from nsgd.trajectory.potentials import Potential


def temperature(*, lr: float, noise: float, batch_size: float) -> float:
    """Temperature of SGD, lr sigma^2 / (2 B); it depends on the batch size through lr / B alone.

    Args:
        lr: Learning rate.
        noise: Variance sigma^2 of the gradient of one sample, along one coordinate.
        batch_size: B.
    """
    return lr * noise / (2 * batch_size)


def escape_time(*, barrier: float, temperature: float, minimum: Tensor, saddle: Tensor) -> float:
    """Mean time of the diffusion from a minimum to the other side of a saddle (Eyring and Kramers), in any dimension.

        tau = 2 pi / |lambda_-| sqrt(|det H_saddle| / det H_minimum) exp(barrier / T),    tau / lr steps

    the leading term for barriers much higher than the temperature; at ten times it is off by some per cent.

    Args:
        barrier: f at the saddle minus f at the minimum.
        temperature: T.
        minimum: Hessian at the minimum, (d, d), or its eigenvalues (d,).
        saddle: Hessian at the saddle, which has one negative eigenvalue lambda_-.

    Raises:
        ValueError: If the Hessians are not those of a minimum and of a saddle with one way down.
    """
    low, high = _eigenvalues(minimum), _eigenvalues(saddle)
    if len(low) != len(high):
        raise ValueError(f"expected Hessians of one size, got {len(low)} and {len(high)} eigenvalues")
    if not bool((low > 0).all()):
        raise ValueError(f"expected a minimum, all eigenvalues above 0, got {low.tolist()}")
    if int((high < 0).sum()) != 1 or bool((high == 0).any()):
        raise ValueError(f"expected a saddle with exactly one negative eigenvalue and none of 0, got {high.tolist()}")
    log_determinants = float(high.abs().log().sum() - low.log().sum())
    return 2 * math.pi / float(high.min().abs()) * math.exp(log_determinants / 2 + barrier / temperature)


def passage_time(
    potential: Potential, *, start: float, end: float, far: float, temperature: float, points: int = 20_001
) -> float:
    """Exact mean time of the one-dimensional diffusion from ``start`` to ``end``, by quadrature.

        tau = 1/T int_start^end exp(f(y) / T) int_far^y exp(-f(z) / T) dz dy

    Args:
        potential: f, vectorised.
        start: Where it sets out.
        end: Where it is stopped.
        far: A point beyond start, on the other side than end, from which it never comes: f is many temperatures up.
        temperature: T.
        points: Of the grid; Simpson's rule.

    Raises:
        ValueError: If start is not between far and end, or f is not high enough at far.
    """
    if not (far < start < end or end < start < far):
        raise ValueError(f"expected start between far and end, got far {far:g}, start {start:g} and end {end:g}")
    grid = np.linspace(far, end, points)
    values = np.asarray(potential(grid), dtype=np.float64)
    lowest = values.min()
    if values[0] < lowest + 30 * temperature:
        raise ValueError(
            f"expected far where f is 30 temperatures above its least, {lowest + 30 * temperature:g}, got f = "
            f"{values[0]:g} at {far:g}; move it away"
        )
    highest = values[(grid >= min(start, end)) & (grid <= max(start, end))].max()
    position = abs(grid - far)
    inner = cumulative_simpson(np.exp((lowest - values) / temperature), x=position, initial=0)
    outer = cumulative_simpson(np.exp(np.minimum(values - highest, 0) / temperature) * inner, x=position, initial=0)
    spent = outer[-1] - np.interp(abs(start - far), position, outer)
    return float(spent / temperature * math.exp((highest - lowest) / temperature))


def gibbs_mass(potential: Potential, *, edges: NDArray[np.float64], temperature: float, points: int = 20_001) -> Tensor:
    """Share of its time that the one-dimensional diffusion spends between consecutive edges: exp(-f / T), normalised.

    Args:
        potential: f, vectorised.
        edges: (n + 1,), ascending, for example both ends and the saddles between.
        temperature: T.
        points: Of the grid in each part.

    Returns:
        Shares (n,) with sum 1.
    """
    grids, densities = _gibbs(potential, edges, temperature, points)
    masses = [simpson(density, x=grid) for grid, density in zip(grids, densities, strict=True)]
    total = torch.tensor(masses, dtype=torch.float64)
    return total / total.sum()


def gibbs_mean(
    potential: Potential,
    quantity: Potential,
    *,
    edges: NDArray[np.float64],
    temperature: float,
    points: int = 20_001,
) -> float:
    """Mean over time of a quantity along the one-dimensional diffusion, weighted with exp(-f / T).

    Args:
        potential: f, vectorised.
        quantity: Of the position, vectorised; f itself gives the mean loss.
        edges: (n + 1,), ascending, as for ``gibbs_mass``.
        temperature: T.
        points: Of the grid in each part.
    """
    grids, densities = _gibbs(potential, edges, temperature, points)
    both = list(zip(grids, densities, strict=True))
    weighted = sum(simpson(quantity(grid) * density, x=grid) for grid, density in both)
    return float(weighted / sum(simpson(density, x=grid) for grid, density in both))


def laplace_mass(*, depths: Tensor, curvatures: Tensor, temperature: float) -> Tensor:
    """Share of its time near each minimum at low temperature: det(H)^(-1/2) exp(-f / T), normalised.

    Of minima of one depth the flatter one wins, by the root of the ratio of their determinants, at every temperature,
    and so for every batch size; a deeper sharp one wins as T goes to 0.

    Args:
        depths: f at the minima, (n,).
        curvatures: Eigenvalues of the Hessians there, (n, d).
        temperature: T.

    Returns:
        Shares (n,) with sum 1.
    """
    logs = -curvatures.double().log().sum(1) / 2 - depths.double() / temperature
    return logs.softmax(0)


def excess_loss(curvatures: Tensor, *, lr: float, noise: float, batch_size: float) -> float:
    """Price of a large lr / B: mean loss of SGD at stationarity above a quadratic minimum, exact for every stable rate.

        sum_i lr sigma^2 / (2 B (2 - lr h_i))

    Args:
        curvatures: h_i, (d,).
        lr: Learning rate, below 2 / h_i.
        noise: Variance sigma^2 of the gradient of one sample, along one coordinate.
        batch_size: B.
    """
    return float((lr * noise / (2 * batch_size * (2 - lr * curvatures.double()))).sum())


@dataclass(frozen=True)
class Escapes:
    """Steps until each of many walkers reached its goal."""

    steps: Tensor  # (walkers,) int64; -1 where it was not reached
    taken: int  # steps that were simulated
    ends: Tensor  # (walkers, d): where each arrived, or was after the last step

    @property
    def reached(self) -> float:
        """Share of the walkers that reached it."""
        return float((self.steps >= 0).double().mean())

    @property
    def mean(self) -> float:
        """Estimated mean number of steps; the plain mean where all walkers have arrived.

        Those that have not are counted as if arrivals came at a constant rate from a tenth of the steps on: that of the
        arrivals since, over the steps of all walkers since. Before, they come late: the way itself takes its time.
        """
        return float(self._expected()[0].mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, for times that are exponential from then on."""
        expected, rest, arrivals = self._expected()
        if not arrivals:
            return math.inf
        share = float((expected > self.taken // 10).double().mean())
        return math.sqrt(float(expected.var(correction=0)) / len(expected) + (share * rest) ** 2 / arrivals)

    def _expected(self) -> tuple[Tensor, float, int]:
        """Each walker's steps, those after the first tenth by their mean; that mean, and the arrivals it is of."""
        early = self.taken // 10
        times = torch.where(self.steps >= 0, self.steps, self.taken).double()
        late = times > early
        arrivals = int((late & (self.steps >= 0)).sum())
        rest = float((times[late] - early).sum()) / arrivals if arrivals else math.inf
        return torch.where(late, early + rest, times), rest, arrivals


def simulate(
    gradient: Callable[[Tensor], Tensor],
    start: Tensor,
    goal: Callable[[Tensor], Tensor],
    *,
    lr: float,
    noise: float,
    batch_size: float,
    steps: int,
    seed: int = 0,
    scale: Tensor | None = None,
    progress: Callable[[int, int], None] = lambda step, reached: None,
) -> Escapes:
    """Run SGD from many starts at once until each reaches its goal, or the steps are over.

    Args:
        gradient: Gradient of the full loss, (n, d) to (n, d).
        start: Where the walkers set out, (n, d).
        goal: Whether a walker is there, (n, d) to (n,) of truth values.
        lr: Learning rate.
        noise: Variance sigma^2 of the gradient of one sample, along each coordinate.
        batch_size: B; the noise of a gradient has variance sigma^2 / B.
        steps: Most steps.
        seed: Of the noise.
        scale: Factors on the step along each coordinate, (d,): gamma where NSGD damps, else 1; or the matrix that
            multiplies the step, (d, d): I - (1 - gamma) v v^T for a direction v.
        progress: Called every 1,000 steps with the steps taken and the walkers that have arrived.

    Raises:
        ValueError: If start is not (n, d), scale does not fit it, or a number is out of range.
    """
    if start.ndim != 2 or len(start) == 0:
        raise ValueError(f"expected starts of shape (walkers, dimensions), got {tuple(start.shape)}")
    if not (lr > 0 and noise >= 0 and batch_size > 0 and steps > 0):
        raise ValueError(
            f"expected lr, batch_size and steps above 0 and noise of at least 0, got lr {lr}, batch_size {batch_size}, "
            f"steps {steps}, noise {noise}"
        )
    d = start.shape[1]
    if scale is not None and tuple(scale.shape) not in ((d,), (d, d)):
        raise ValueError(f"expected scale of shape ({d},) or ({d}, {d}), got {tuple(scale.shape)}")
    generator = torch.Generator(start.device).manual_seed(seed)
    factor = lr * (torch.ones(d, dtype=start.dtype) if scale is None else scale).to(start)
    spread = math.sqrt(noise / batch_size)
    found = torch.full((len(start),), -1, dtype=torch.int64)
    running = torch.arange(len(start))  # those still under way
    position, ends = start.clone(), start.clone()
    taken = 0
    while len(running) and taken < steps:
        shake = torch.randn(position.shape, generator=generator, dtype=start.dtype, device=start.device)
        push = gradient(position) + shake.mul_(spread)
        position -= push * factor if factor.ndim == 1 else push @ factor.T
        taken += 1
        arrived = goal(position).cpu()
        if bool(arrived.any()):
            there, rest = arrived.nonzero()[:, 0], (~arrived).nonzero()[:, 0]
            found[running[there]] = taken
            ends[running[there]] = position[there]
            running, position = running[rest], position[rest]
        if taken % 1000 == 0:
            progress(taken, len(start) - len(running))
    ends[running] = position
    return Escapes(found, taken, ends)


def _eigenvalues(hessian: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(hessian.double()) if hessian.ndim == 2 else hessian.double().sort().values


def _gibbs(
    potential: Potential, edges: NDArray[np.float64], temperature: float, points: int
) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]:
    """A grid between each two edges, and exp(-f / T) on it, up to one factor."""
    grids = [np.linspace(a, b, points) for a, b in pairwise(edges)]
    values = [np.asarray(potential(grid), dtype=np.float64) for grid in grids]
    lowest = min(v.min() for v in values)
    return grids, [np.exp((lowest - v) / temperature) for v in values]
