"""A potential with two minima and the saddle between them, built in or the user's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize, root
from torch import Tensor

from nsgd.curvature.checks import of_their_kind, shown
from nsgd.trajectory.escape.diffusion import effective_potential
from nsgd.trajectory.escape.potentials import Channel, DoubleWell, Potential

BUILT_IN = ("double-well", "channel")

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Landscape:
    """A potential with two minima and the saddle between them."""

    potential: Map  # (n, d) -> (n,)
    gradient: Map  # (n, d) -> (n, d)
    start: Tensor  # (d,), float64, as the others: the minimum that walkers leave
    saddle: Tensor  # (d,)
    goal: Tensor  # (d,): the minimum that they reach
    steepest: float  # largest curvature that walkers meet
    # Temperature and rate across the first coordinate -> the potential that drives it, and the mean loss along it.
    reduced: Callable[[float, float], tuple[Potential, Potential]] | None
    # Factor on the variance of the noise by position, (n, d) -> (n,); None where it is the same everywhere.
    spread: Map | None = None

    def value(self, point: Tensor) -> float:
        """The potential at a point (d,)."""
        return float(self.potential(point[None])[0])

    def hessian(self, point: Tensor) -> Tensor:
        """(d, d), at a point (d,)."""
        return _hessian(self.potential, point)

    def curvatures(self, point: Tensor) -> Tensor:
        """Eigenvalues of the Hessian, (d,), ascending."""
        eigenvalues: Tensor = torch.linalg.eigvalsh(self.hessian(point))
        return eigenvalues

    @property
    def barrier(self) -> float:
        """Height of the saddle above the start."""
        return self.value(self.saddle) - self.value(self.start)

    @property
    def lowest(self) -> float:
        """Value of the deeper minimum."""
        return min(self.value(self.start), self.value(self.goal))

    @property
    def names(self) -> tuple[str, str]:
        """Of the start and the goal: the flat one has the smaller determinant."""
        start, goal = (float(self.curvatures(point).log().sum()) for point in (self.start, self.goal))
        return ("sharp", "flat") if start >= goal else ("flat", "sharp")

    @property
    def way_out(self) -> Tensor:
        """Direction (d,) of the one negative curvature at the saddle, towards the goal."""
        direction: Tensor = torch.linalg.eigh(self.hessian(self.saddle)).eigenvectors[:, 0]
        return direction if float(direction @ (self.goal - self.saddle)) > 0 else -direction

    def spread_at(self, point: Tensor) -> float:
        """Factor on the variance of the noise at a point (d,)."""
        return 1.0 if self.spread is None else float(self.spread(point[None])[0])

    def spread_along(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same along the line of a one-dimensional landscape, (n,) to (n,)."""
        if self.spread is None:
            return np.ones_like(x)
        return np.asarray(self.spread(torch.from_numpy(x)[:, None]).detach(), dtype=np.float64)

    @property
    def effective_barrier(self) -> float:
        """What the barrier is to noise that depends on the position, in one dimension; NaN in more.

        U at the saddle minus U at the start, U being :func:`nsgd.trajectory.escape.diffusion.effective_potential`.
        """
        return self.effective_height(self.start)

    def effective_height(self, minimum: Tensor) -> float:
        """What the saddle's height above a minimum is to the noise; NaN where that depends on several coordinates."""
        if self.spread is None:
            return self.value(self.saddle) - self.value(minimum)
        if len(self.start) > 1 or self.reduced is None:
            return math.nan
        potential, _ = self.reduced(0.0, 0.0)
        values = effective_potential(
            potential, self.spread_along, np.linspace(float(minimum[0]), self.along[1], 20_001)
        )
        return float(values[-1] - values[0])

    @property
    def along(self) -> tuple[float, float, float]:
        """First coordinate of the start, the saddle and the goal."""
        return float(self.start[0]), float(self.saddle[0]), float(self.goal[0])


@of_their_kind
def built_in_landscape(name: str, *, barrier: float, skew: float, walls: float) -> Landscape:
    """The double well, or the channel along it.

    Raises:
        ValueError: If there is none of that name, or a number is out of range.
    """
    if name not in BUILT_IN:
        raise ValueError(f"expected name to be one of {', '.join(BUILT_IN)}, got {shown(name)}")
    well = DoubleWell(barrier=barrier, skew=skew)
    left, right = well.minima
    points = torch.tensor([[left, 0.0], [0.0, 0.0], [right, 0.0]], dtype=torch.float64, device="cpu")
    if name == "double-well":
        start, saddle, goal = points[:, :1]
        steepest = well.curvature(left)
        return Landscape(
            lambda x: well(x[:, 0]), well.gradient, start, saddle, goal, steepest, lambda heat, rate: (well, well)
        )
    channel = Channel(well, walls)

    def reduced(heat: float, rate: float) -> tuple[Potential, Potential]:
        return channel.marginal(temperature=heat, rate=rate), channel.mean_loss(temperature=heat, rate=rate)

    start, saddle, goal = points
    steepest = max(well.curvature(left), walls * (1 + skew) ** 2)
    return Landscape(channel, channel.gradient, start, saddle, goal, steepest, reduced)


NOISES = ("constant", "loss", "curvature")  # what the variance of the noise follows


@of_their_kind
def with_noise(landscape: Landscape, follows: str, *, floor: float) -> Landscape:
    """A landscape whose noise has a variance that depends on the position.

    The variance is sigma^2 (floor + (1 - floor) g): g is the loss above the deeper minimum over the barrier, as where
    gradients vanish with the loss (Mori et al. 2021), or the size of the Hessian over that at the start, by the root of
    the sum of squares, as where the noise's covariance follows the Hessian (Xie et al. 2021).

    Args:
        landscape: With noise that is the same everywhere.
        follows: "constant" for that, "loss" or "curvature".
        floor: Share of sigma^2 that is there everywhere, above 0 and at most 1.

    Raises:
        ValueError: If it follows something else, or the floor is out of range.
    """
    if follows not in NOISES:
        raise ValueError(f"expected follows to be one of {', '.join(NOISES)}, got {shown(follows)}")
    if not 0 < floor <= 1:
        raise ValueError(f"expected a floor above 0 and at most 1, got {shown(floor)}; without any nobody leaves")
    if follows == "constant":
        return landscape
    height, lowest = landscape.barrier, landscape.lowest

    def by_loss(points: Tensor) -> Tensor:
        shares: Tensor = ((landscape.potential(points).detach() - lowest) / height).clamp(min=0.0)
        return floor + (1 - floor) * shares

    at_start = float(landscape.hessian(landscape.start).norm())

    def by_curvature(points: Tensor) -> Tensor:
        sizes: Tensor = torch.linalg.vector_norm(_hessians(landscape.gradient, points), dim=(1, 2))
        return floor + (1 - floor) * sizes / at_start

    return replace(landscape, spread=by_loss if follows == "loss" else by_curvature)


def _hessians(gradient: Map, points: Tensor) -> Tensor:
    """Hessians (n, d, d) at points (n, d), by central differences of the gradient, which walkers can pay for."""
    step = 1e-5 if points.dtype == torch.float64 else 1e-3
    columns = []
    for i in range(points.shape[1]):
        shift = torch.zeros_like(points)
        shift[:, i] = step
        columns.append((gradient(points + shift) - gradient(points - shift)) / (2 * step))
    found: Tensor = torch.stack(columns, dim=2)
    return found


@of_their_kind
def landscape_between(
    potential: Map, start: Tensor, goal: Tensor, saddle: Tensor | None = None, *, name: str = "the potential"
) -> Landscape:
    """Any potential, with minima and saddle found near the points that are given.

    Args:
        potential: Points (n, d) to losses (n,), of torch tensors.
        start: Near the minimum that walkers leave, (d,), as the others.
        goal: Near the one that they reach.
        saddle: Near the saddle; None for the highest point straight between.
        name: What the potential is called, for messages.

    Raises:
        ValueError: If the points are no vectors of one length, the potential is no such function, or there is no such
            point near the one given.
    """
    shapes = [tuple(point.shape) for point in (start, goal, saddle) if point is not None]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or shapes[0] == (0,):
        raise ValueError(f"expected start, goal and saddle to be points (d,) of one dimension d, got shapes {shapes}")
    ends = torch.stack([start, goal]).double().requires_grad_()
    values = potential(ends)
    if not (isinstance(values, Tensor) and values.shape == (2,) and values.requires_grad):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            f"expected {name} to take points (n, {len(start)}) to losses (n,) that autograd can "
            f"follow, got {got} for 2 points"
        )
    left, right = (_stationary_point(potential, point, negative=0) for point in ends.detach())
    if float((left - right).norm()) < 1e-6:
        raise ValueError(f"expected start and goal near two minima, got one, at {left.tolist()}; move them apart")
    if saddle is None:
        line = torch.lerp(left, right, torch.linspace(0, 1, 1001, dtype=torch.float64, device="cpu")[:, None])
        saddle = line[int(potential(line).argmax())]
    top = _stationary_point(potential, saddle.double(), negative=1)

    def gradient(points: Tensor) -> Tensor:
        points = points.detach().requires_grad_()
        slopes: Tensor = torch.autograd.grad(potential(points).sum(), points)[0]
        return slopes

    def one_dimensional(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(potential(torch.from_numpy(x)[:, None]).detach(), dtype=np.float64)

    steepest = max(float(torch.linalg.eigvalsh(_hessian(potential, point))[-1]) for point in (left, right, top))
    reduced = (lambda heat, rate: (one_dimensional, one_dimensional)) if len(start) == 1 else None
    return Landscape(potential, gradient, left, top, right, steepest, reduced)


def _stationary_point(potential: Map, near: Tensor, *, negative: int) -> Tensor:
    """The minimum (no negative curvature) or saddle (one) near a point."""
    kind = "saddle" if negative else "start or goal"

    def gradient(x: NDArray[np.float64]) -> NDArray[np.float64]:
        point = torch.from_numpy(x).requires_grad_()
        return np.asarray(torch.autograd.grad(potential(point[None])[0], point)[0])

    def hessian(x: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(_hessian(potential, torch.from_numpy(x)))

    begin = near.numpy()
    if not negative:
        begin = minimize(lambda x: float(potential(torch.from_numpy(x)[None])[0]), begin, jac=gradient).x
    solution = root(gradient, begin, jac=hessian, tol=1e-12).x
    curvatures = np.linalg.eigvalsh(hessian(solution))
    flat = np.abs(gradient(solution)).max() > 1e-6 * np.abs(curvatures).max()
    if not np.isfinite(solution).all() or flat or (curvatures == 0).any() or (curvatures < 0).sum() != negative:
        raise ValueError(
            f"expected a {'saddle with one negative curvature' if negative else 'minimum'} near {near.tolist()}, got "
            f"curvatures {np.round(curvatures, 6).tolist()} at {np.round(solution, 6).tolist()}; give a nearer {kind}"
        )
    return torch.from_numpy(solution)


def _hessian(potential: Map, point: Tensor) -> Tensor:
    matrix: Tensor = torch.autograd.functional.hessian(lambda x: potential(x[None])[0], point)  # type: ignore[no-untyped-call]
    return matrix
