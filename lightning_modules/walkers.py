"""One run of ``nsgd escape``: many walkers on a landscape, by SGD, and what is counted of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_modules.landscape import Landscape, Map
from lightning_modules.rows import Rows
from nsgd.trajectory.escape import Escapes, simulate, temperature

Update = Callable[[int, str], None]  # steps taken, how the walkers stand


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
        sgd: lr, noise and batch_size.
        walkers: Their number.
        steps: Most of them.
        seed: Of the noise.
        update: Called on the way.
        scale: Matrix that multiplies the step, (d, d).

    Raises:
        ValueError: If walkers diverge.
    """
    toward = landscape.goal - landscape.start
    there = float(landscape.goal @ toward)
    found = _walk(
        landscape,
        sgd,
        landscape.start.expand(walkers, -1),
        lambda points: points @ toward.to(points) >= there,
        steps=steps,
        seed=seed,
        scale=scale,
        progress=lambda step, arrived: update(step, f"{arrived:,} of {walkers:,} walkers arrived"),
    )
    arrived = int((found.steps >= 0).sum())
    counts = {"walkers": walkers, "steps": found.taken, "arrived": arrived, "censored": walkers - arrived}
    return {**counts, "measured": found.mean, "standard_error": found.standard_error}


def stay(landscape: Landscape, sgd: dict[str, float], *, walkers: int, steps: int, seed: int, update: Update) -> Rows:
    """Share of walkers on the flat minimum's side, from either minimum and from both, and their mean loss.

    Args: as for ``escape``; half of the walkers begin in each minimum.
    """
    count = walkers // 2
    both = []
    for i, (name, begin) in enumerate(zip(landscape.names, (landscape.start, landscape.goal), strict=True)):

        def half(step: int, _: int, done: int = i * steps, origin: str = name) -> None:
            update((done + step) // 2, f"{count:,} walkers from the {origin} minimum")

        begins = begin.expand(count, -1)
        found = _walk(landscape, sgd, begins, _never, steps=steps, seed=seed + i, progress=half)
        both.append(found.ends.double())
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


def _row(quantity: str, origin: str, walkers: int, steps: int, measured: float, error: float) -> dict[str, Any]:
    counts = {"quantity": quantity, "origin": origin, "walkers": walkers, "steps": steps}
    return {**counts, "measured": measured, "standard_error": error}


def _never(points: Tensor) -> Tensor:
    return torch.zeros(len(points), dtype=torch.bool)


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
    found = simulate(
        landscape.gradient,
        start.float(),  # far finer than the noise, in half the time
        goal,
        lr=sgd["lr"],
        noise=sgd["noise"],
        batch_size=sgd["batch_size"],
        steps=steps,
        seed=seed,
        scale=scale,
        progress=progress,
    )
    # Nobody comes as high as this but by a step that is too long, which may well end beyond the goal.
    heat = temperature(**sgd) * (1.0 if scale is None else max(1.0, float(torch.linalg.matrix_norm(scale, 2))))
    highest = landscape.value(landscape.saddle) + 100 * heat
    if not bool((landscape.potential(found.ends.double()).detach() <= highest).all()):
        raise ValueError(
            f"SGD diverged at lr {sgd['lr']:g} and batch size {sgd['batch_size']:g}; choose smaller --lr or larger "
            "batches"
        )
    return found
