"""What the diffusion predicts for SGD on a landscape: by quadrature, NaN where there is none, and to leading order."""

from __future__ import annotations

import math

import numpy as np
import torch

from nsgd.curvature.checks import above_zero, at_least_zero, of_their_kind
from nsgd.trajectory.escape.diffusion import (
    escape_time,
    excess_loss,
    gibbs_mass,
    gibbs_mean,
    laplace_mass,
    passage_time,
    temperature,
)
from nsgd.trajectory.escape.landscape import Landscape
from nsgd.trajectory.escape.potentials import Potential


@of_their_kind
def predicted_steps(
    landscape: Landscape, sgd: dict[str, float], *, out: float = 1.0, across: float = 1.0
) -> tuple[float, float]:
    """Steps of an escape.

    A factor along the way out is one on lr, and so on the temperature. One across it keeps walkers closer to the middle
    of the valley, which changes what drives them along it.

    Args:
        landscape: What is left, from its start to its goal.
        sgd: lr, noise and batch_size.
        out: Factor on the step along the way out.
        across: Factor on the step across it.

    Raises:
        ValueError: If a number is out of range, or one of sgd is missing.
    """
    above_zero("out", out)
    at_least_zero("across", across)
    heat = temperature(**sgd)
    lr = sgd["lr"]
    exact = leading = math.nan
    if landscape.reduced is not None:
        start, _, goal = landscape.along
        potential, _ = landscape.reduced(across * heat, across * lr)
        left, right = _walls(potential, start, goal, out * heat)
        far = left if start < goal else right
        exact = passage_time(potential, start=start, end=goal, far=far, temperature=out * heat) / (out * lr)
    if out == across == 1 or len(landscape.start) == 1:
        curvatures = {"minimum": landscape.hessian(landscape.start), "saddle": landscape.hessian(landscape.saddle)}
        leading = escape_time(barrier=landscape.barrier, temperature=out * heat, **curvatures) / (out * lr)
    return exact, leading


@of_their_kind
def predicted_stay(landscape: Landscape, sgd: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Share of the flat minimum, and mean loss above the deeper minimum.

    The quadrature is of the diffusion, so its loss is raised by what a finite rate adds on quadratics along the way.

    Args:
        landscape: Where SGD stays.
        sgd: lr, noise and batch_size.

    Raises:
        ValueError: If a number is out of range, or one of sgd is missing.
    """
    heat = temperature(**sgd)
    minima = (landscape.start, landscape.goal)
    curvatures = torch.stack([landscape.curvatures(point) for point in minima])
    depths = torch.tensor(
        [landscape.value(point) - landscape.lowest for point in minima], dtype=torch.float64, device="cpu"
    )
    mass = laplace_mass(depths=depths, curvatures=curvatures, temperature=heat)
    prices = torch.tensor([excess_loss(c, **sgd) for c in curvatures], dtype=torch.float64, device="cpu")
    flat = landscape.names.index("flat")
    share = loss = math.nan
    if landscape.reduced is not None:
        start, saddle, goal = landscape.along
        potential, mean_loss = landscape.reduced(heat, sgd["lr"])
        left, right = _walls(potential, start, goal, heat)
        edges = np.array([left, saddle, right])
        masses = gibbs_mass(potential, edges=edges, temperature=heat).tolist()
        share = masses[flat if start < goal else 1 - flat]
        loss = gibbs_mean(potential, mean_loss, edges=edges, temperature=heat) - landscape.lowest
        along = (landscape.hessian(point)[0, :1] for point in minima)
        loss += sum(m * (excess_loss(h, **sgd) - heat / 2) for m, h in zip(mass.tolist(), along, strict=True))
    return {"share": (share, float(mass[flat])), "loss": (loss, float(mass @ (depths + prices)))}


def _walls(potential: Potential, start: float, goal: float, heat: float) -> tuple[float, float]:
    """Points left and right of both minima where the potential is so high that no walker comes there."""
    step = abs(goal - start) / 4
    left, right = min(start, goal), max(start, goal)
    for _ in range(400):
        values = potential(np.linspace(left, right, 2001))
        high = values >= values.min() + 40 * heat
        if high[0] and high[-1]:
            return left, right
        left, right = left - step * (not high[0]), right + step * (not high[-1])
    raise ValueError(
        f"expected a potential that rises 40 temperatures, {40 * heat:.3g}, above its minima on both sides, got one "
        f"that does not between {left:.3g} and {right:.3g}"
    )
