"""What the diffusion predicts for SGD on a landscape: by quadrature, NaN where there is none, and to leading order."""

from __future__ import annotations

import math

import numpy as np
import torch

from nsgd.curvature.checks import above_zero, at_least_zero, of_their_kind
from nsgd.trajectory.escape.diffusion import (
    effective_potential,
    energy_factor,
    escape_time,
    excess_loss,
    gibbs_mass,
    gibbs_mean,
    inertia,
    kramers_factor,
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
    of the valley, which changes what drives them along it. Where the noise depends on the position, there are
    predictions in one dimension alone: to leading order, with r = 1 for the same noise everywhere,

        tau = 2 pi / sqrt(|f''_saddle| f''_minimum) sqrt(r_saddle / r_minimum) exp(int f' / r / T).

    With momentum both are longer by :func:`nsgd.trajectory.escape.diffusion.kramers_factor` and, where there is one
    coordinate that leads out, by :func:`nsgd.trajectory.escape.diffusion.energy_factor`; NaN where the noise depends on
    the position as well.

    Args:
        landscape: What is left, from its start to its goal.
        sgd: lr, noise, batch_size, and momentum if there is any.
        out: Factor on the step along the way out.
        across: Factor on the step across it.

    Raises:
        ValueError: If a number is out of range, or one of sgd is missing.
    """
    above_zero("out", out)
    at_least_zero("across", across)
    heat, beta = temperature(**sgd), sgd.get("momentum", 0.0)
    rate = out * sgd["lr"] / (1 - beta)  # along the way out
    mass = inertia(lr=out * sgd["lr"], momentum=beta)
    slower = kramers_factor(inertia=mass, saddle=landscape.hessian(landscape.saddle))
    exact = leading = math.nan
    spread = None if landscape.spread is None else landscape.spread_along
    in_one = len(landscape.start) == 1
    if spread is not None and mass:
        return exact, leading
    if landscape.reduced is not None and (spread is None or in_one):
        start, saddle, goal = landscape.along
        potential, _ = landscape.reduced(across * heat, across * sgd["lr"] / (1 + beta))
        left, right = _walls(potential, spread, start, goal, out * heat)
        far = left if start < goal else right
        slower *= energy_factor(potential, saddle=saddle, far=far, inertia=mass, temperature=out * heat)
        time = passage_time(potential, start=start, end=goal, far=far, temperature=out * heat, spread=spread)
        exact = slower * time / rate
    if in_one or (spread is None and out == across == 1):
        curvatures = {"minimum": landscape.hessian(landscape.start), "saddle": landscape.hessian(landscape.saddle)}
        ratio = landscape.spread_at(landscape.saddle) / landscape.spread_at(landscape.start)
        barrier = landscape.effective_barrier
        time = escape_time(barrier=barrier, temperature=out * heat, **curvatures)
        leading = slower * math.sqrt(ratio) * time / rate
    return exact, leading


@of_their_kind
def predicted_stay(landscape: Landscape, sgd: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Share of the flat minimum, and mean loss above the deeper minimum.

    The quadrature is of the diffusion, so its loss is raised by what a finite rate adds on quadratics along the way.

    Args:
        landscape: Where SGD stays.
        sgd: As for ``predicted_steps``.

    Raises:
        ValueError: If a number is out of range, or one of sgd is missing.
    """
    heat = temperature(**sgd)
    minima = (landscape.start, landscape.goal)
    curvatures = torch.stack([landscape.curvatures(point) for point in minima])
    depths = torch.tensor(
        [landscape.value(point) - landscape.lowest for point in minima], dtype=torch.float64, device="cpu"
    )
    spread = None if landscape.spread is None else landscape.spread_along
    factors = [landscape.spread_at(point) for point in minima]
    flat = landscape.names.index("flat")
    share = loss = math.nan
    unknown = len(landscape.start) > 1 or landscape.reduced is None or sgd.get("momentum", 0.0) > 0
    if spread is not None and unknown:
        return {"share": (share, share), "loss": (loss, loss)}  # no formula
    local = [{**sgd, "noise": sgd["noise"] * factor} for factor in factors]
    prices = torch.tensor(
        [excess_loss(c, **at) for c, at in zip(curvatures, local, strict=True)], dtype=torch.float64, device="cpu"
    )
    felt, widths = depths, curvatures
    if spread is not None:  # the depths of U, and the widths of exp(-U / T) / r
        felt = torch.tensor([-landscape.effective_height(point) for point in minima], dtype=torch.float64, device="cpu")
        widths = curvatures * torch.tensor(factors, dtype=torch.float64, device="cpu")[:, None]
    mass = laplace_mass(depths=felt, curvatures=widths, temperature=heat)
    if landscape.reduced is not None:
        start, saddle, goal = landscape.along
        potential, mean_loss = landscape.reduced(heat, sgd["lr"] / (1 + sgd.get("momentum", 0.0)))
        left, right = _walls(potential, spread, start, goal, heat)
        edges = np.array([left, saddle, right])
        masses = gibbs_mass(potential, edges=edges, temperature=heat, spread=spread).tolist()
        share = masses[flat if start < goal else 1 - flat]
        loss = gibbs_mean(potential, mean_loss, edges=edges, temperature=heat, spread=spread) - landscape.lowest
        for m, point, at, factor in zip(mass.tolist(), minima, local, factors, strict=True):
            loss += m * (excess_loss(landscape.hessian(point)[0, :1], **at) - heat * factor / 2)
    return {"share": (share, float(mass[flat])), "loss": (loss, float(mass @ (depths + prices)))}


def _walls(
    potential: Potential, spread: Potential | None, start: float, goal: float, heat: float
) -> tuple[float, float]:
    """Points left and right of both minima where the potential is so high that no walker comes there."""
    step = abs(goal - start) / 4
    left, right = min(start, goal), max(start, goal)
    for _ in range(400):
        values = effective_potential(potential, spread, np.linspace(left, right, 2001))
        high = values >= values.min() + 40 * heat
        if high[0] and high[-1]:
            return left, right
        left, right = left - step * (not high[0]), right + step * (not high[-1])
    raise ValueError(
        f"expected a potential that rises 40 temperatures, {40 * heat:.3g}, above its minima on both sides, got one "
        f"that does not between {left:.3g} and {right:.3g}"
    )
