"""Walkers that run SGD itself, with its steps of finite length, until they reach a goal."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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
