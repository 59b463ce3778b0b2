"""SGD along the sharpest directions of the loss (Jastrzębski et al. 2019, arXiv 1807.05031).

How much of a gradient lies along the top eigenvectors e_i of the Hessian, what a step along each of them does to the
loss, and which curvature a learning rate still bears. Batch sharpness is that of Andreyev & Beneventano (arXiv
2412.20553).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from nsgd.curvature.checks import at_least_zero, check_vectors, in_one_dtype, of_their_kind, shown, whole_number
from nsgd.curvature.eigen import Eigenpairs, product_of, top_eigenpairs
from nsgd.curvature.guard import full_precision
from nsgd.curvature.hessian import HVP, Closure, loss_hessian, say_unreached
from nsgd.curvature.vectors import checked_params, vector_dtype
from nsgd.trajectory.line import losses_along
from nsgd.trajectory.quadratic import OwnBatch

# Of the step, in the paper's step decomposition; and of its length along a direction, in its cross-sections.
MULTIPLES = (1 / 4, 1 / 3, 1 / 2, 1.0, 2.0, 3.0, 4.0)
OFFSETS = (-16.0, -8.0, -4.0, -2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)


@of_their_kind
def root_sum_square(eigenvalues: Tensor) -> float:
    """Root of the sum of squares of the top eigenvalues; of the top 50 it is the paper's Frobenius norm."""
    return float(torch.linalg.vector_norm(eigenvalues.double()))


@of_their_kind
@full_precision
def alignment(gradient: Tensor, directions: Tensor) -> Tensor:
    """Cosines of a gradient (P,) with orthonormal directions (k, P); NaN without a gradient. Shape (k,), float64.

    The root of the sum of their squares is the share of the gradient, in norm, that lies in the span.
    """
    check_vectors(gradient=gradient)
    _check_directions(directions, len(gradient))
    gradient, directions = in_one_dtype(gradient, directions)
    length: Tensor = torch.linalg.vector_norm(gradient, dtype=torch.float64)
    inside: Tensor = directions @ gradient
    return inside.double().cpu() / length.cpu()


@of_their_kind
def own_batch(loss: Tensor | Closure, params: Iterable[Tensor]) -> tuple[Tensor, OwnBatch]:
    """A batch's gradient (P,), and its loss along it: a gradient and a product, worth three gradients.

    Raises:
        ValueError: As :func:`nsgd.curvature.hessian.loss_hessian`.
        FloatingPointError: If the loss or its gradient is NaN or infinite.
    """
    params = checked_params(params)
    gradient, own, unreached = _own_batch(loss, params)
    say_unreached(unreached, params, depth=3)
    return gradient, own


def _own_batch(loss: Tensor | Closure, params: list[Tensor]) -> tuple[Tensor, OwnBatch, frozenset[int]]:
    """The same, with the numbers of the parameters that the loss does not reach."""
    values: list[Tensor] = []

    def noted() -> Tensor:
        value = loss() if callable(loss) else loss
        if isinstance(value, Tensor):  # anything else is refused where its gradient is taken
            values.append(value.detach())
        return value

    with loss_hessian(noted, params) as hessian:
        gradient = hessian.gradient
        curvature = torch.dot(gradient, hessian.hvp(gradient))
    own = OwnBatch(float(values[0]), float(torch.dot(gradient, gradient)), float(curvature))
    return gradient, own, hessian.unreached


@of_their_kind
def batch_sharpness(losses: Iterable[Tensor | Closure], params: Iterable[Tensor]) -> float:
    """Mean over batches of g^T H_B g / |g|^2, the batch's own curvature along its own gradient.

    At the edge of stochastic stability it is 2 / lr. Costs three gradients a batch.
    """
    if not isinstance(losses, Iterable) or isinstance(losses, Tensor | str | bytes):
        raise ValueError(f"expected the losses of batches, got {shown(losses)}; pass a list of them")
    params = checked_params(params)
    found = [_own_batch(loss, params)[1:] for loss in losses]
    if not found:
        raise ValueError("expected the loss of one batch or more, got none")
    say_unreached(frozenset.intersection(*(unreached for _, unreached in found)), params, depth=3)
    return sum(own.sharpness for own, _ in found) / len(found)


@of_their_kind
def cross_section(
    loss: Closure, params: Iterable[Tensor], direction: Tensor, *, scale: float, offsets: Sequence[float] = OFFSETS
) -> Tensor:
    """Losses at theta + offset * scale * direction, (n,) float64.

    Args:
        loss: One fixed function of the parameters, on the same samples each time.
        params: The parameters.
        direction: e_i, (P,), of length 1.
        scale: Usual length of a step along it, lr times the mean of |g . e_i| over batches, as in the paper.
        offsets: (n,).
    """
    return losses_along(loss, params, direction, [offset * scale for offset in offsets])


@of_their_kind
def step_losses(
    loss: Closure,
    params: Iterable[Tensor],
    gradient: Tensor,
    *,
    lr: float,
    direction: Tensor | None = None,
    multiples: Sequence[float] = MULTIPLES,
) -> Tensor:
    """Losses after a * lr of a batch's gradient, or of its part along a direction, for each multiple a; (n,) float64.

    The paper averages them over ten gradients, for each of the top directions, a random one and the whole step.

    Args:
        loss: One fixed function of the parameters, of more samples than the batch.
        params: The parameters.
        gradient: g of a batch, (P,).
        lr: Learning rate.
        direction: Of length 1, (P,): the step is -a lr (g . e) e. None for the whole step.
        multiples: a, (n,).
    """
    check_vectors(gradient=gradient, direction=gradient if direction is None else direction)
    if direction is not None:
        gradient, direction = in_one_dtype(gradient, direction)
    move = gradient if direction is None else torch.dot(gradient, direction) * direction
    return losses_along(loss, params, -lr * move, multiples)


@of_their_kind
def best_multiple(*, lr: float, eigenvalue: float, slope: float, second_moment: float) -> float:
    """The a at which :func:`step_losses` is least in the mean over batches, along an eigenvector of a quadratic.

    The mean change is -a lr <grad L, e>^2 + a^2 lr^2 lambda E<g, e>^2 / 2, which is least at

        a* = <grad L, e>^2 / (lr lambda E<g, e>^2)

    and back at nothing at twice that: below one half the step is too long. Infinite where the eigenvalue is not
    positive.

    Args:
        lr: Learning rate.
        eigenvalue: lambda, of the loss that is evaluated.
        slope: <grad L, e>, of its full gradient.
        second_moment: E<g, e>^2 over batches.
    """
    bend = lr * eigenvalue * second_moment
    return slope * slope / bend if bend > 0 else math.inf


@of_their_kind
def stability_limit(*, lr: float, momentum: float = 0.0, gamma: float = 1.0, sine: float = 0.0) -> float:
    """Curvature up to which steps are stable, (2 + 2 momentum) / (lr (gamma + (1 - gamma) sin^2 phi)).

    Without damping, gamma = 1, the edge of stability; along damped directions (2 + 2 momentum) / (gamma lr). With a
    direction at an angle phi from the basis it is a necessary condition, exact for a Hessian of rank one: below gamma =
    sin^2 phi a smaller gamma buys nothing. :func:`damped_sharpness` is what it stands for.

    Args:
        lr: Learning rate.
        momentum: Of heavy-ball SGD.
        gamma: Factor on the step along the directions.
        sine: sin(phi), the part of the true direction outside of the basis.
    """
    factor = lr * (gamma + (1 - gamma) * sine * sine)
    return (2 + 2 * momentum) / factor if factor > 0 else math.inf


@of_their_kind
def damped_sharpness(
    hvp: HVP,
    params: Iterable[Tensor],
    directions: Tensor,
    *,
    gamma: float,
    max_hvps: int | None = None,
    tol: float = 1e-3,
    seed: int = 0,
) -> Eigenpairs:
    """The sharpness that a damped step feels: the top eigenpair of M^(1/2) H M^(1/2), M = I - (1 - gamma) V^T V.

    Stable while below (2 + 2 momentum) / lr. Costs a Lanczos run of some ten to thirty products.

    Args:
        hvp: Products with the Hessian, (P,) to (P,).
        params: The parameters.
        directions: V, orthonormal, (k, P).
        gamma: Factor on the step along them, 0 or more.
        max_hvps: As in :func:`nsgd.top_eigenpairs`.
        tol: As in :func:`nsgd.top_eigenpairs`.
        seed: Of the starting vector.
    """
    params = checked_params(params)
    _check_directions(directions, sum(p.numel() for p in params))
    directions = directions.to(vector_dtype(params))
    factor = 1 - math.sqrt(at_least_zero("gamma", gamma))

    @full_precision
    def root(vector: Tensor) -> Tensor:
        return vector - factor * ((directions @ vector) @ directions)

    options: dict[str, Any] = {"max_hvps": max_hvps, "tol": tol, "seed": seed, "repeated": False}
    return top_eigenpairs(lambda v: root(product_of(hvp, root(v))), params, k=1, **options)


def _check_directions(directions: Tensor, size: int) -> None:
    if directions.ndim != 2 or directions.shape[1] != size:
        raise ValueError(f"expected directions of shape (k, {size}), got {tuple(directions.shape)}")


@of_their_kind
def random_direction(params: Iterable[Tensor], *, seed: int) -> Tensor:
    """A direction (P,) of length 1, uniform on the sphere, the paper's control."""
    params = checked_params(params)
    generator = torch.Generator().manual_seed(whole_number("seed", seed, least=0, most=2**63 - 1))
    # Drawn on the CPU: the same direction whatever the device.
    vector = torch.randn(sum(p.numel() for p in params), generator=generator, dtype=torch.float64, device="cpu")
    unit: Tensor = vector / torch.linalg.vector_norm(vector)
    return unit.to(device=params[0].device, dtype=vector_dtype(params))
