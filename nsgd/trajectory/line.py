"""The loss along a straight line through the parameters, and the parabola through its lowest points."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nsgd.curvature.checks import check_vectors, is_real, of_their_kind, plain, shown
from nsgd.curvature.guard import RandomState, untouched
from nsgd.curvature.hessian import Closure
from nsgd.curvature.vectors import checked_params, split


@of_their_kind
@contextmanager
def moved(params: Iterable[Tensor], direction: Tensor, step: float) -> Iterator[None]:
    """Hold parameters at ``params + step * direction``; on leaving they are what they were, to the bit.

    Costs a copy of the parameters.

    Args:
        params: The parameters, P entries together.
        direction: (P,).
        step: How far to go along it; at 0 nothing moves.

    Raises:
        ValueError: If the direction does not fit the parameters.
    """
    params = checked_params(params)
    size = sum(p.numel() for p in params)
    if direction.shape != (size,):
        raise ValueError(
            f"expected a direction of shape ({size},), one entry a parameter, got {tuple(direction.shape)}"
        )
    if step == 0:
        yield
        return
    origin = [p.detach().clone() for p in params]
    try:
        with torch.no_grad():
            for p, start, block in zip(params, origin, split(direction, params), strict=True):
                p.copy_(start.to(block) + step * block)  # in the precision of the direction, and rounded once
        yield
    finally:
        with torch.no_grad():
            for p, start in zip(params, origin, strict=True):
                p.copy_(start)


@of_their_kind
def losses_along(loss: Closure, params: Iterable[Tensor], direction: Tensor, steps: Sequence[float]) -> Tensor:
    """Losses at ``params + step * direction`` for each step, (n,) float64 on the CPU.

    Every point sees the same random state, so that dropout masks and augmentation repeat. Parameters come back to the
    bit, buffers, modes and random state as found, also after an exception. Costs n forward passes, a third of a
    gradient each, and a copy of the parameters. Under ``torch.no_grad()`` no graph is made, where the loss needs none.

    Args:
        loss: Computes the loss; called once for each step.
        params: The parameters, P entries together.
        direction: (P,).
        steps: How far to go along it, n of them; 0 is where the parameters are.

    Raises:
        ValueError: If the direction does not fit the parameters.
    """
    params = checked_params(params)
    device = params[0].device
    if len(steps) == 0:
        raise ValueError("expected one step or more to go along the direction, got none")
    random_state = RandomState(device)
    values = []
    for step in steps:
        random_state.restore()
        with moved(params, direction, step), untouched(device=device):  # spectral norm changes with every pass
            values.append(_scalar(loss()))
    return torch.stack(values)


def _scalar(loss: Any) -> Tensor:
    """What a loss returned, float64 on the CPU."""
    value = plain(loss.detach().cpu().reshape(-1)[0] if isinstance(loss, Tensor) and loss.numel() == 1 else loss)
    if not is_real(value):
        raise ValueError(f"expected the loss to return one number, got {shown(value)}; reduce it, as with .mean()")
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")


@of_their_kind
def vertex(positions: Tensor, losses: Tensor) -> tuple[float, float]:
    """Position and value of the vertex of the parabola through the three lowest points.

    The lowest point itself where these three are not convex.

    Args:
        positions: (n,), three different ones or more.
        losses: (n,).

    Raises:
        ValueError: If there are fewer than three points.
    """
    check_vectors(positions=positions)
    if len(positions) < 3 or positions.shape != losses.shape:
        raise ValueError(
            f"expected three points or more, a loss for each position, got shapes {tuple(positions.shape)} and "
            f"{tuple(losses.shape)}"
        )
    chosen = losses.double().argsort(stable=True)[:3].sort().values
    x, y = positions.double()[chosen], losses.double()[chosen]
    first, second = (y[1:] - y[:-1]) / (x[1:] - x[:-1])  # divided differences
    bend = (second - first) / (x[2] - x[0])  # half the curvature
    if not bend > 0:
        lowest = int(losses.argmin())
        return float(positions[lowest]), float(losses[lowest])
    best = (x[0] + x[1] - first / bend) / 2
    return float(best), float(y[0] + (best - x[0]) * (first + bend * (best - x[1])))
