"""A potential with two minima and the saddle between them, built in or the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize, root
from torch import Tensor

from nsgd.curvature.checks import of_their_kind, shown
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
