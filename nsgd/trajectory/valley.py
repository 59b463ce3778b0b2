"""SGD as a walk in a valley: the loss between consecutive iterates (Xing et al. 2018, arXiv 1802.08770).

Between two iterates the loss falls to a floor and rises again: SGD goes from wall to wall, at a height above the floor.
The paper's released code draws new augmentation and BatchNorm batches at every point, which is noise between a
segment's end and the next one's start; here the caller's loss is one fixed function, and the end of a segment is the
start of the next to the bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nsgd.curvature.checks import check_vectors, in_one_dtype, of_their_kind
from nsgd.trajectory.line import vertex


@dataclass(frozen=True)
class Segment:
    """The loss between two consecutive iterates, at alpha = 0 the first and at alpha = 1 the second."""

    alphas: Tensor  # (n,) ascending from 0 to 1
    losses: Tensor  # (n,)
    position: float  # alpha of the floor, the vertex of the parabola through the three lowest points; may leave [0, 1]
    floor: float  # loss there
    grid_position: float  # alpha of the lowest of the points strictly inside, the paper's floor
    grid_floor: float  # loss there
    height: float  # mean loss of both ends above the floor
    barrier: float  # how far an inner point lies above both ends; 0 where none does


@of_their_kind
def segment(alphas: Tensor, losses: Tensor) -> Segment:
    """Findings about the valley from the losses along one step.

    Args:
        alphas: (n,), ascending from 0 to 1, three or more.
        losses: Losses at ``(1 - alpha) theta_t + alpha theta_{t+1}``, (n,), all of the same samples.

    Raises:
        ValueError: If the alphas are not such.
    """
    check_vectors(alphas=alphas, losses=losses)
    if len(alphas) < 3 or float(alphas[0]) != 0 or float(alphas[-1]) != 1 or not bool((alphas.diff() > 0).all()):
        raise ValueError(f"expected alphas ascending from 0 to 1, three or more, got {alphas.tolist()}")
    alphas, losses = alphas.double().cpu(), losses.double().cpu()
    position, floor = vertex(alphas, losses)
    lowest = 1 + int(losses[1:-1].argmin())
    return Segment(
        alphas,
        losses,
        position,
        floor,
        grid_position=float(alphas[lowest]),
        grid_floor=float(losses[lowest]),
        height=float((losses[0] + losses[-1]) / 2) - floor,
        barrier=float((losses[1:-1].max() - torch.maximum(losses[0], losses[-1])).clamp(min=0)),
    )


@of_their_kind
def predicted_position(slope: float, curvature: float) -> float:
    """The place of the floor on a quadratic: alpha* = -grad L . d / (d^T H d), d the step taken; NaN on a concave one.

    For plain SGD, d = -lr g, it is grad L . g / (lr g^T H g), one half on average once the loss no longer falls,
    whatever the curvature. Momentum, weight decay and damping change d, so they are taken in.

    Args:
        slope: grad L . d, with the gradient of the loss that is evaluated.
        curvature: d^T H d, with its Hessian: one product.
    """
    return -slope / curvature if curvature > 0 else math.nan


@of_their_kind
def predicted_height(slope: float, curvature: float) -> float:
    """Height above the floor on a quadratic: (c / 4) (alpha*^2 + (1 - alpha*)^2), c = d^T H d; NaN on a concave one.

    Args:
        slope: grad L . d.
        curvature: d^T H d.
    """
    best = predicted_position(slope, curvature)
    return curvature / 4 * (best * best + (1 - best) * (1 - best))


@of_their_kind
def floor_barriers(floors: Tensor) -> Tensor:
    """Heights of the barriers along the floor, (m,): how far each rise climbs before the floor falls again.

    Walking from floor to floor would have to cross them; SGD passes above.

    Args:
        floors: Losses of consecutive floors, (T,).
    """
    check_vectors(floors=floors)
    rises, bottom, top = [], math.inf, math.inf
    for value in floors.tolist():
        if value < top:
            rises.append(top - bottom)
            bottom = value
        top = value
    return torch.tensor([rise for rise in rises if rise > 0], dtype=torch.float64, device="cpu")


@of_their_kind
def cosine(one: Tensor, other: Tensor) -> float:
    """Cosine of the angle between two vectors, such as consecutive gradients; NaN where one is 0.

    Its mean depends on the batch size as well: noise hides the direction. The floor's position does not.
    """
    check_vectors(one=one, other=other)
    one, other = in_one_dtype(one, other)
    lengths = torch.linalg.vector_norm(one) * torch.linalg.vector_norm(other)
    return float(torch.dot(one, other) / lengths) if lengths > 0 else math.nan
