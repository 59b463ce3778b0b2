"""Walkers that run SGD itself, with its steps of finite length: to any goal, and on a landscape of two minima."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsgd.curvature.checks import above_zero, at_least_zero, below_one, of_their_kind, shown, whole_number
from nsgd.trajectory.escape.diffusion import temperature
from nsgd.trajectory.escape.landscape import Landscape, Map

_MOST = 2**31 - 1  # of walkers, and of steps

Update = Callable[[int, str], None]  # steps taken, how the walkers stand


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


@of_their_kind
def simulate(
    gradient: Callable[[Tensor], Tensor],
    start: Tensor,
    goal: Callable[[Tensor], Tensor],
    *,
    lr: float,
    noise: float,
    batch_size: float,
    steps: int,
    momentum: float = 0.0,
    seed: int = 0,
    scale: Tensor | None = None,
    spread: Map | None = None,
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
        momentum: beta of torch's SGD, from 0 to below 1; walkers set out at rest.
        seed: Of the noise.
        scale: Factors on the step along each coordinate, (d,): gamma where NSGD damps, else 1; or the matrix that
            multiplies the step, (d, d): I - (1 - gamma) v v^T for a direction v. The velocity itself is not scaled.
        spread: Factor on the noise's variance by position, (n, d) to (n,), not negative; None for 1 everywhere.
        progress: Called every 1,000 steps with the steps taken and the walkers that have arrived.

    Raises:
        ValueError: If start is not (n, d), scale does not fit it, or a number is out of range.
    """
    if start.ndim != 2 or len(start) == 0 or not start.is_floating_point():
        raise ValueError(f"expected starts of shape (walkers, dimensions), real numbers, got {shown(start)}")
    lr, noise, batch_size = above_zero("lr", lr), at_least_zero("noise", noise), above_zero("batch_size", batch_size)
    _check_counts(steps=steps, seed=seed)
    d, beta = start.shape[1], below_one("momentum", momentum)
    if scale is not None and tuple(scale.shape) not in ((d,), (d, d)):
        raise ValueError(f"expected scale of shape ({d},) or ({d}, {d}), got {tuple(scale.shape)}")
    generator = torch.Generator(start.device).manual_seed(seed)
    factor = lr * (torch.ones(d, dtype=start.dtype, device="cpu") if scale is None else scale).to(start)
    usual = math.sqrt(noise / batch_size)
    arrival_steps = torch.full((len(start),), -1, dtype=torch.int64, device="cpu")
    running = torch.arange(len(start), device="cpu")  # those still under way
    position, ends = start.clone(), start.clone()
    velocity = torch.zeros_like(start)
    step = 0
    while len(running) and step < steps:
        shake = torch.randn(position.shape, generator=generator, dtype=start.dtype, device=start.device)
        slope = gradient(position)
        if not isinstance(slope, Tensor) or slope.shape != position.shape:
            raise ValueError(f"expected a gradient of shape {tuple(position.shape)}, got {shown(slope)}")
        deviation = usual if spread is None else _deviation(spread, position) * usual
        push = slope + shake.mul_(deviation)
        if beta:
            push = velocity = push.add_(velocity, alpha=beta)
        position -= push * factor if factor.ndim == 1 else push @ factor.T
        step += 1
        there_now = goal(position)
        if not isinstance(there_now, Tensor) or there_now.shape != position.shape[:1] or there_now.dtype != torch.bool:
            raise ValueError(f"expected goal to give {len(position)} truth values, got {shown(there_now)}")
        arrived = there_now.cpu()
        if bool(arrived.any()):
            there, rest = arrived.nonzero()[:, 0], (~arrived).nonzero()[:, 0]
            arrival_steps[running[there]] = step
            ends[running[there]] = position[there]
            running, position, velocity = running[rest], position[rest], velocity[rest]
        if step % 1000 == 0:
            progress(step, len(start) - len(running))
    ends[running] = position
    return Escapes(arrival_steps, step, ends)


@of_their_kind
def escape(
    landscape: Landscape,
    sgd: dict[str, float],
    *,
    walkers: int,
    steps: int,
    seed: int,
    update: Update,
    scale: Tensor | None = None,
) -> dict[str, float]:
    """Steps from one minimum to the other: past it, along the straight line between them.

    Args:
        landscape: What walkers leave, from its start to its goal.
        sgd: lr, noise, batch_size, and momentum if there is any.
        walkers: Their number.
        steps: Most of them.
        seed: Of the noise.
        update: Called on the way.
        scale: Matrix that multiplies the step, (d, d).

    Raises:
        ValueError: If walkers diverge, or a number is out of range.
    """
    whole_number("walkers", walkers, least=1, most=_MOST)
    toward = landscape.goal - landscape.start
    there = float(landscape.goal @ toward)
    escapes = _walk(
        landscape,
        sgd,
        landscape.start.expand(walkers, -1),
        lambda points: points @ toward.to(points) >= there,
        steps=steps,
        seed=seed,
        scale=scale,
        progress=lambda step, arrived: update(step, f"{arrived:,} of {walkers:,} walkers arrived"),
    )
    arrived = int((escapes.steps >= 0).sum())
    counts = {"walkers": walkers, "steps": escapes.taken, "arrived": arrived, "censored": walkers - arrived}
    return {**counts, "measured": escapes.mean, "standard_error": escapes.standard_error}


@of_their_kind
def stay(
    landscape: Landscape, sgd: dict[str, float], *, walkers: int, steps: int, seed: int, update: Update
) -> list[dict[str, Any]]:
    """Share of walkers on the flat minimum's side, from either minimum and from both, and their mean loss.

    Args: as for ``escape``; half of the walkers begin in each minimum.

    Raises:
        ValueError: As ``escape``.
    """
    whole_number("walkers", walkers, least=2, most=_MOST)
    count = walkers // 2
    both = []
    for i, (name, begin) in enumerate(zip(landscape.names, (landscape.start, landscape.goal), strict=True)):

        def half(step: int, _: int, done: int = i * steps, origin: str = name) -> None:
            update((done + step) // 2, f"{count:,} walkers from the {origin} minimum")

        begins = begin.expand(count, -1)
        escapes = _walk(landscape, sgd, begins, _never, steps=steps, seed=seed + i, progress=half)
        both.append(escapes.ends.double())
    ends = torch.stack(both)  # (2, count, d): of those from the start, and from the goal
    flat = (ends - landscape.saddle) @ landscape.way_out > 0  # (2, count)
    excess = landscape.potential(ends.flatten(0, 1)).detach().view(2, count) - landscape.lowest
    if landscape.names[0] == "flat":
        flat, excess = ~flat.flip(0), excess.flip(0)
    from_sharp, from_flat = flat.double().mean(1).tolist()
    share, error = _stationary(from_sharp, 1 - from_flat, count)
    sides = ((share, excess[flat]), (1 - share, excess[~flat]))
    loss = sum(weight * float(values.mean()) for weight, values in sides)
    variance = sum(weight**2 * float(values.var(correction=0)) / len(values) for weight, values in sides if len(values))
    variance += float(excess[flat].mean() - excess[~flat].mean()) ** 2 * error**2
    return [
        _row("share", "sharp", count, steps, from_sharp, math.sqrt(from_sharp * (1 - from_sharp) / count)),
        _row("share", "flat", count, steps, from_flat, math.sqrt(from_flat * (1 - from_flat) / count)),
        _row("share", "both", 2 * count, steps, share, error),
        _row("loss", "both", 2 * count, steps, loss, math.sqrt(variance)),
    ]


def _check_counts(*, steps: int, seed: int) -> None:
    whole_number("steps", steps, least=1, most=_MOST)
    whole_number("seed", seed, least=0, most=2**63 - 2)  # the one after it is drawn from as well


def _row(quantity: str, origin: str, walkers: int, steps: int, measured: float, error: float) -> dict[str, Any]:
    counts = {"quantity": quantity, "origin": origin, "walkers": walkers, "steps": steps}
    return {**counts, "measured": measured, "standard_error": error}


def _deviation(spread: Map, position: Tensor) -> Tensor:
    """Factor on the noise's standard deviation, (n, 1)."""
    factors: Any = spread(position)
    if not isinstance(factors, Tensor) or factors.shape != position.shape[:1]:
        raise ValueError(f"expected spread to give {len(position)} factors, got {shown(factors)}")
    deviations: Tensor = factors.sqrt()[:, None]
    return deviations


def _never(points: Tensor) -> Tensor:
    return torch.zeros(len(points), dtype=torch.bool, device="cpu")


def _stationary(there: float, back: float, count: int) -> tuple[float, float]:
    """Stationary share of the second of two states, and its standard error.

    From either state the share of changed walkers approaches its stationary value at the one rate of both, so that the
    ratio of the two is stationary from the beginning.

    Args:
        there: Share of those that began in the first and are in the second.
        back: The converse.
        count: Of walkers that began in each.
    """
    if there == 0 or back == 0:
        return math.nan, math.nan
    share = there / (there + back)
    relative = (1 - there) / (there * count) + (1 - back) / (back * count)
    return share, share * (1 - share) * math.sqrt(relative)


def _walk(
    landscape: Landscape,
    sgd: dict[str, float],
    start: Tensor,
    goal: Map,
    *,
    steps: int,
    seed: int,
    progress: Callable[[int, int], None],
    scale: Tensor | None = None,
) -> Escapes:
    heat, d = temperature(**sgd), len(landscape.start)
    if scale is not None and scale.shape != (d, d):
        raise ValueError(f"expected scale of shape ({d}, {d}), got {tuple(scale.shape)}")
    escapes = simulate(
        landscape.gradient,
        start.float(),  # far finer than the noise, in half the time
        goal,
        lr=sgd["lr"],
        noise=sgd["noise"],
        batch_size=sgd["batch_size"],
        momentum=sgd.get("momentum", 0.0),
        steps=steps,
        seed=seed,
        scale=scale,
        spread=landscape.spread,
        progress=progress,
    )
    # Nobody comes as high as this but by a step that is too long, which may well end beyond the goal.
    heat = heat * (1.0 if scale is None else max(1.0, float(torch.linalg.matrix_norm(scale, 2))))
    if landscape.spread is not None:
        heat = heat * float(landscape.spread(landscape.saddle[None]).max())
    highest = landscape.value(landscape.saddle) + 100 * heat
    if not bool((landscape.potential(escapes.ends.double()).detach() <= highest).all()):
        raise ValueError(
            f"SGD diverged at lr {sgd['lr']:g} and batch size {sgd['batch_size']:g}; choose smaller --lr or larger "
            "batches"
        )
    return escapes
