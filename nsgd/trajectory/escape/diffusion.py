"""How long SGD takes to leave a minimum, and where it spends its time (Dai & Zhu 2018, arXiv 1812.00542).

SGD with gradient noise of variance sigma^2 / B in every coordinate, theta <- theta - lr (grad f + sigma / sqrt(B) xi),
is for small lr the diffusion d theta = -grad f dt + sqrt(2 T) dW at the temperature T = lr sigma^2 / (2 B), with one
step for every lr of its time. To leave a minimum is to reach the other one: the way to the saddle takes half as long.

The formulas hold for minima that are not degenerate, and where nothing else is said for noise that is the same
everywhere, which decides them: of noise whose variance at x is sigma^2 r(x), in one dimension,

    U(x) = int f'(x) / r(x) dx

takes the place of f, and exp(-U / T) / r that of the density (Ito's integral, as SGD draws its noise before it steps).
The one-dimensional time is exact for the diffusion.

With momentum, v <- beta v + g, theta <- theta - lr v, the rate is lr / (1 - beta), in the temperature as well, and
walkers have an inertia of m = lr beta / (1 - beta)^2: m d^2 theta / dt^2 + d theta / dt = -grad f + noise. The density
keeps its form where the noise is the same everywhere; escapes are slower by two factors, for the way over the saddle
(Kramers 1940) and for the energy that walkers keep (Mel'nikov & Meshkov 1986). Of noise that depends on the position no
formula is known with it.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import cumulative_simpson, simpson
from torch import Tensor

from nsgd.curvature.checks import (
    above_zero,
    at_least_zero,
    below_one,
    check_numbers,
    check_vectors,
    of_their_kind,
    shown,
    whole_number,
)
from nsgd.trajectory.escape.potentials import Potential


@of_their_kind
def temperature(*, lr: float, noise: float, batch_size: float, momentum: float = 0.0) -> float:
    """Temperature of SGD, lr sigma^2 / (2 B (1 - beta)); it depends on the batch size through lr / B alone.

    Args:
        lr: Learning rate.
        noise: Variance sigma^2 of the gradient of one sample, along one coordinate.
        batch_size: B.
        momentum: beta, from 0 to below 1.

    Raises:
        ValueError: If lr or the batch size is not above 0, the noise negative, or the momentum out of range.
    """
    rate = above_zero("lr", lr) / (1 - below_one("momentum", momentum))
    return rate * at_least_zero("noise", noise) / (2 * above_zero("batch_size", batch_size))


@of_their_kind
def inertia(*, lr: float, momentum: float) -> float:
    """m = lr beta / (1 - beta)^2, what momentum adds to the diffusion; 0 without.

    Args:
        lr: Learning rate.
        momentum: beta, from 0 to below 1.

    Raises:
        ValueError: If a number is out of range.
    """
    beta = below_one("momentum", momentum)
    return above_zero("lr", lr) * beta / (1 - beta) ** 2


@of_their_kind
def kramers_factor(*, inertia: float, saddle: Tensor) -> float:
    """How much longer an escape takes with inertia, |lambda_-| / mu, with m mu^2 + mu = |lambda_-| (Kramers 1940).

    mu is the rate at which walkers leave the saddle; 1 without inertia.

    Args:
        inertia: m.
        saddle: Hessian at the saddle, (d, d), or its eigenvalues (d,).

    Raises:
        ValueError: If the saddle has no negative eigenvalue, or the inertia is negative.
    """
    down = float(_eigenvalues("saddle", saddle).min())
    if not down < 0:
        raise ValueError(f"expected a saddle with a negative eigenvalue, got {down:g} as its least")
    return (1 + math.sqrt(1 - 4 * at_least_zero("inertia", inertia) * down)) / 2


@of_their_kind
def energy_factor(
    potential: Potential, *, saddle: float, far: float, inertia: float, temperature: float, points: int = 20_001
) -> float:
    """How much longer an escape takes where walkers keep their energy for long (Mel'nikov & Meshkov 1986).

        1 / A(E / T),  log A(e) = 1 / (2 pi) int log(1 - exp(-e (x^2 + 1/4))) / (x^2 + 1/4) dx,
        E = 2 int sqrt(2 (f_saddle - f) / m) dx

    E is what friction takes from a walker that swings once through the well from the saddle's height: much more than
    the temperature where momentum is not near 1, and the factor 1. It is that of a first passage.

    Args:
        potential: f in one dimension, vectorised.
        saddle: Where the saddle is.
        far: A point beyond the minimum that is left, where f is above the saddle.
        inertia: m.
        temperature: T.
        points: Of the grid.

    Raises:
        ValueError: If a number is out of range.
    """
    above_zero("temperature", temperature)
    _check_points(points)
    check_numbers(saddle=saddle, far=far)
    if at_least_zero("inertia", inertia) == 0:
        return 1.0
    grid = np.linspace(far, saddle, points)
    values = _values(potential, grid)
    depth = np.maximum(values[-1] - values, 0)
    taken = 2 * float(simpson(np.sqrt(2 * depth / inertia), x=abs(grid - far))) / temperature
    if taken > 100:  # the factor is 1 to the last digit
        return 1.0
    if taken < 1e-6:
        return math.inf
    x = np.linspace(0, 60 / math.sqrt(taken), points)
    weights = x * x + 0.25
    integral = 2 * float(simpson(np.log(-np.expm1(-taken * weights)) / weights, x=x))  # of both halves
    return _exp(-integral / (2 * math.pi))


@of_their_kind
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
    above_zero("temperature", temperature)
    check_numbers(barrier=barrier)
    low, high = _eigenvalues("minimum", minimum), _eigenvalues("saddle", saddle)
    if len(low) != len(high):
        raise ValueError(f"expected Hessians of one size, got {len(low)} and {len(high)} eigenvalues")
    if not bool((low > 0).all()):
        raise ValueError(f"expected a minimum, all eigenvalues above 0, got {low.tolist()}")
    if int((high < 0).sum()) != 1 or bool((high == 0).any()):
        raise ValueError(f"expected a saddle with exactly one negative eigenvalue and none of 0, got {high.tolist()}")
    log_determinants = float(high.abs().log().sum() - low.log().sum())
    return 2 * math.pi / float(high.min().abs()) * _exp(log_determinants / 2 + barrier / temperature)


@of_their_kind
def passage_time(
    potential: Potential,
    *,
    start: float,
    end: float,
    far: float,
    temperature: float,
    points: int = 20_001,
    spread: Potential | None = None,
) -> float:
    """Exact mean time of the one-dimensional diffusion from ``start`` to ``end``, by quadrature.

        tau = 1/T int_start^end exp(U(y) / T) int_far^y exp(-U(z) / T) / r(z) dz dy,    U = f where r = 1

    Args:
        potential: f, vectorised.
        start: Where it sets out.
        end: Where it is stopped.
        far: A point beyond start, on the other side than end, from which it never comes: U is many temperatures up.
        temperature: T.
        points: Of the grid; Simpson's rule.
        spread: r, factor on the noise's variance by position, vectorised, above 0; None for 1 everywhere.

    Raises:
        ValueError: If start is not between far and end, U is not high enough at far, or a number is out of range.
    """
    check_numbers(start=start, end=end, far=far)
    above_zero("temperature", temperature)
    _check_points(points)
    if not (far < start < end or end < start < far):
        raise ValueError(f"expected start between far and end, got far {far:g}, start {start:g} and end {end:g}")
    grid = np.linspace(far, end, points)
    factors = _factors(spread, grid)
    values = _effective(_values(potential, grid), factors)
    lowest = values.min()
    if values[0] < lowest + 30 * temperature:
        raise ValueError(
            f"expected far where f, as the noise feels it, is 30 temperatures above its least, got "
            f"{(values[0] - lowest) / temperature:.3g} of them at {far:g}; move it away"
        )
    highest = values[(grid >= min(start, end)) & (grid <= max(start, end))].max()
    position = abs(grid - far)
    inner = cumulative_simpson(np.exp((lowest - values) / temperature) / factors, x=position, initial=0)
    outer = cumulative_simpson(np.exp(np.minimum(values - highest, 0) / temperature) * inner, x=position, initial=0)
    spent = outer[-1] - np.interp(abs(start - far), position, outer)
    return float(spent / temperature * _exp((highest - lowest) / temperature))


@of_their_kind
def gibbs_mass(
    potential: Potential,
    *,
    edges: NDArray[np.float64],
    temperature: float,
    points: int = 20_001,
    spread: Potential | None = None,
) -> Tensor:
    """Share of its time that the one-dimensional diffusion spends between consecutive edges: exp(-U / T) / r.

    Args:
        potential: f, vectorised.
        edges: (n + 1,), ascending, for example both ends and the saddles between.
        temperature: T.
        points: Of the grid in each part.
        spread: As in :func:`passage_time`.

    Returns:
        Shares (n,) with sum 1.

    Raises:
        ValueError: If the edges do not ascend, or a number is out of range.
    """
    grids, densities = _gibbs(potential, edges, temperature, points, spread)
    masses = [simpson(density, x=grid) for grid, density in zip(grids, densities, strict=True)]
    total = torch.tensor(masses, dtype=torch.float64, device="cpu")
    return total / total.sum()


@of_their_kind
def gibbs_mean(
    potential: Potential,
    quantity: Potential,
    *,
    edges: NDArray[np.float64],
    temperature: float,
    points: int = 20_001,
    spread: Potential | None = None,
) -> float:
    """Mean over time of a quantity along the one-dimensional diffusion, weighted with exp(-U / T) / r.

    Args:
        potential: f, vectorised.
        quantity: Of the position, vectorised; f itself gives the mean loss.
        edges: (n + 1,), ascending, as for ``gibbs_mass``.
        temperature: T.
        points: Of the grid in each part.
        spread: As in :func:`passage_time`.

    Raises:
        ValueError: As ``gibbs_mass``.
    """
    grids, densities = _gibbs(potential, edges, temperature, points, spread)
    both = list(zip(grids, densities, strict=True))
    weighted = sum(simpson(_values(quantity, grid) * density, x=grid) for grid, density in both)
    return float(weighted / sum(simpson(density, x=grid) for grid, density in both))


@of_their_kind
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

    Raises:
        ValueError: If the shapes do not fit, a curvature is not above 0, or the temperature is not.
    """
    above_zero("temperature", temperature)
    check_vectors(depths=depths)
    if curvatures.ndim != 2 or len(curvatures) != len(depths) or not bool((curvatures > 0).all()):
        raise ValueError(
            f"expected curvatures above 0, of shape ({len(depths)}, d), a row for each minimum, got shape "
            f"{tuple(curvatures.shape)} and least {float(curvatures.min()) if curvatures.numel() else 'none'}"
        )
    logs = -curvatures.double().log().sum(1) / 2 - depths.double() / temperature
    return logs.softmax(0)


@of_their_kind
def excess_loss(curvatures: Tensor, *, lr: float, noise: float, batch_size: float, momentum: float = 0.0) -> float:
    """Price of a large lr / B: mean loss of SGD at stationarity above a quadratic minimum, exact for every stable rate.

        sum_i lr sigma^2 / (2 B (1 - beta) (2 - lr h_i / (1 + beta)))

    Args:
        curvatures: h_i, (d,).
        lr: Learning rate, below 2 (1 + beta) / h_i.
        noise: Variance sigma^2 of the gradient of one sample, along one coordinate.
        batch_size: B.
        momentum: beta, from 0 to below 1.

    Raises:
        ValueError: If a number is out of range.
    """
    check_vectors(curvatures=curvatures)
    heat = temperature(lr=lr, noise=noise, batch_size=batch_size, momentum=momentum)
    beta = below_one("momentum", momentum)
    return float((heat / (2 - above_zero("lr", lr) / (1 + beta) * curvatures.double())).sum())


def _eigenvalues(name: str, hessian: Tensor) -> Tensor:
    square = hessian.ndim == 2 and hessian.shape[0] == hessian.shape[1]
    if not (square or hessian.ndim == 1) or not hessian.numel() or not bool(hessian.isfinite().all()):
        raise ValueError(
            f"expected {name} to be a finite Hessian (d, d), or its eigenvalues (d,), got shape {tuple(hessian.shape)}"
            f"{', with NaN or infinity in it' if hessian.numel() and (square or hessian.ndim == 1) else ''}"
        )
    return torch.linalg.eigvalsh(hessian.double()) if hessian.ndim == 2 else hessian.double().sort().values


def _gibbs(
    potential: Potential, edges: NDArray[np.float64], temperature: float, points: int, spread: Potential | None
) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]]]:
    """A grid between each two edges, and exp(-U / T) / r on it, up to one factor."""
    above_zero("temperature", temperature)
    _check_points(points)
    if edges.ndim != 1 or len(edges) < 2 or not np.isfinite(edges).all() or not (np.diff(edges) > 0).all():
        raise ValueError(f"expected two or more finite edges, ascending, got {shown(edges.tolist())}")
    grids = [np.linspace(a, b, points) for a, b in pairwise(edges)]
    factors = [_factors(spread, grid) for grid in grids]
    values, before = [], None
    for grid, factor in zip(grids, factors, strict=True):
        own = _effective(_values(potential, grid), factor)
        if before is not None:  # U goes on where the part before ends
            own = own + (before - own[0])
        before = own[-1]
        values.append(own)
    lowest = min(v.min() for v in values)
    return grids, [np.exp((lowest - v) / temperature) / r for v, r in zip(values, factors, strict=True)]


def effective_potential(
    potential: Potential, spread: Potential | None, grid: NDArray[np.float64]
) -> NDArray[np.float64]:
    """U on a grid: what the potential is to noise whose variance depends on the position; f at its first point.

    Args:
        potential: f, vectorised.
        spread: r, as in :func:`passage_time`.
        grid: Positions (n,), along a line.

    Raises:
        ValueError: If the spread is not above 0 everywhere, or one of them gives no number for each position.
    """
    return _effective(_values(potential, grid), _factors(spread, grid))


def _factors(spread: Potential | None, grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """r on a grid."""
    if spread is None:
        return np.ones_like(grid)
    factors = _values(spread, grid)
    if not (factors > 0).all():
        raise ValueError(f"expected a spread above 0 everywhere, got {factors.min():g}; raise its floor")
    return factors


def _effective(values: NDArray[np.float64], factors: NDArray[np.float64]) -> NDArray[np.float64]:
    """U on a grid, by the trapezium rule over the changes of f, and equal to f at its first point."""
    if (factors == 1).all():
        return values
    steps = np.diff(values) * (1 / factors[1:] + 1 / factors[:-1]) / 2
    return np.concatenate([values[:1], values[0] + np.cumsum(steps)])


def _values(potential: Potential, grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """A potential on a grid."""
    values = potential(grid)
    if not isinstance(values, np.ndarray) or values.shape != grid.shape or values.dtype.kind not in "fiu":
        raise ValueError(
            f"expected the potential to take arrays (n,) to numbers (n,), got {shown(values)} for {len(grid)} points"
        )
    return values.astype(np.float64, copy=False)


def _check_points(points: int) -> None:
    whole_number("points", points, least=3, most=2**24)  # Simpson's rule; more than that fill the memory


def _exp(power: float) -> float:
    """The exponential, infinite where Python has no number for it."""
    return math.exp(power) if power < 709 else math.inf
