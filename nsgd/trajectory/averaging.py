"""Averages of iterates, and the learning-rate schedules that they equal (Sandler et al. 2023, arXiv 2301.02312).

An average of the iterates of SGD at a constant rate, sum_k w_k theta_k, is the last iterate of SGD under a schedule
that falls at the end. To first order the schedule is lr times the tail sums of the weights; on a quadratic it is known
for each curvature. The algebra is derived here from the paper's model, a quadratic loss whose minimum moves from batch
to batch: theta_{t+1} = theta_t - lr h (theta_t - xi_t), with independent xi of variance s^2 along a direction of
curvature h. One step multiplies the distance from the minimum by rho = 1 - lr h.

Weights (T + 1,) belong to the iterates theta_0 ... theta_T; schedules (T,) to the steps 0 ... T - 1 between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nsgd.curvature.checks import check_vectors, in_float64, of_their_kind, whole_number


@of_their_kind
def ema_weights(steps: int, *, decay: float) -> Tensor:
    """Weights (steps + 1,) of the exponential moving average that starts at theta_0: decay^T on it.

    Args:
        steps: T, 0 or more.
        decay: Share of the last average, in [0, 1); 0 is the last iterate.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check(steps)
    if not 0 <= decay < 1:
        raise ValueError(f"expected decay in [0, 1), got {decay}")
    weights = (1 - decay) * decay ** torch.arange(steps, -1, -1, dtype=torch.float64, device="cpu")
    weights[0] = decay**steps
    return weights


@of_their_kind
def swa_weights(steps: int, *, window: int) -> Tensor:
    """Weights (steps + 1,) of the plain mean of the last ``window`` iterates, theta_T among them.

    Raises:
        ValueError: If the window is not between 1 and T + 1.
    """
    _check(steps)
    if not 1 <= window <= steps + 1:
        raise ValueError(
            f"expected a window of 1 to {steps + 1} iterates, all there are after {steps} steps, got {window}"
        )
    weights = torch.zeros(steps + 1, dtype=torch.float64, device="cpu")
    weights[-window:] = 1 / window
    return weights


@of_their_kind
def two_point_weights(steps: int, *, spacing: int) -> Tensor:
    """Weights (steps + 1,) of the mean of theta_T and theta_{T - spacing}.

    Raises:
        ValueError: If the spacing is not between 1 and T.
    """
    _check(steps)
    if not 1 <= spacing <= steps:
        raise ValueError(f"expected a spacing of 1 to {steps} steps, all there are, got {spacing}")
    weights = torch.zeros(steps + 1, dtype=torch.float64, device="cpu")
    weights[[-1, -1 - spacing]] = 0.5
    return weights


@of_their_kind
def tail_sums(weights: Tensor) -> Tensor:
    """Share of each gradient in an average of iterates, (T,): W_t = sum of w_k over k > t.

    sum_k w_k theta_k = theta_0 - sum_t lr W_t g_t for any loss, with the gradients that were recorded. As a schedule,
    lr W_t, it leaves out that later gradients would change, an error that grows with lr h times the window.

    Args:
        weights: Of the iterates, (T + 1,), with sum 1.
    """
    weights = _checked(weights)
    return weights.flip(0).cumsum(0).flip(0)[1:]


@of_their_kind
def equivalent_schedule(weights: Tensor, *, lr: float, curvature: float | Tensor) -> Tensor:
    """Learning rates under which the last iterate of SGD is the average of SGD at a constant rate, on a quadratic.

    The batches are the same, the gradients recomputed. Along a direction of curvature h, start included, exactly

        lr'_t = lr e_t / (e_t + sum of w_k over k <= t),    e_t = sum of w_k rho^(k - 1 - t) over k > t

    which tends to ``lr * tail_sums(weights)`` where lr h times the window is small.

    Args:
        weights: Of the iterates, (T + 1,), with sum 1.
        lr: The constant rate.
        curvature: h, or several (m,); also zero or negative.

    Returns:
        The rates (T,), or (m, T); infinite where no rate will do.

    Raises:
        ValueError: If the weights do not sum to 1.
    """
    weights = _checked(weights)
    ahead = _ahead(weights, 1 - lr * in_float64(curvature))
    before = weights.cumsum(0)[:-1]
    # Before the first weight the rate is lr; as a quotient it is 0 / 0 where lr h = 1 and later moves wipe it out.
    return torch.where(before == 0, lr, lr * ahead / (ahead + before))


@of_their_kind
def average_moments(weights: Tensor, *, lr: float, curvature: float | Tensor) -> tuple[Tensor, Tensor]:
    """How far an average of iterates has moved from the start, along a direction of the model.

    With mean gradient g at the start and gradients' variance v from batch to batch, the average lies at -drift g in the
    mean, with variance spread v:

        drift = lr sum of e_t,    spread = lr^2 sum of e_t^2,    e_t as in :func:`equivalent_schedule`

    Its expected loss is that of the start and -drift g^2 + h (drift^2 g^2 + spread v) / 2. It holds after any number of
    steps, not only at stationarity.

    Args:
        weights: Of the iterates, (T + 1,), with sum 1.
        lr: The constant rate.
        curvature: h, or several (m,); also zero or negative.

    Returns:
        Drift and spread, shaped like the curvature.

    Raises:
        ValueError: If the weights do not sum to 1.
    """
    moves: Tensor = lr * _ahead(_checked(weights), 1 - lr * in_float64(curvature))
    return moves.sum(-1), moves.square().sum(-1)


@of_their_kind
def stationary_variance(*, lr: float, curvature: float | Tensor, noise: float | Tensor = 1.0) -> Tensor:
    """Variance of the last iterate of SGD at a constant rate along a direction: lr h s^2 / (2 - lr h).

    Args:
        lr: The rate.
        curvature: h > 0, or several (m,).
        noise: s^2, the variance of the minimum from batch to batch; that of the gradient is h^2 s^2.

    Returns:
        The variance, shaped like the curvature; infinite where lr h >= 2, which is unstable.

    Raises:
        ValueError: If the rate or a curvature is not positive, or a noise negative.
    """
    h, spread = (in_float64(value) for value in (curvature, noise))
    if not lr > 0 or not bool((h > 0).all()) or not bool((spread >= 0).all()):
        raise ValueError(
            f"expected lr and curvature above 0 and noise of at least 0, got {lr}, {h.tolist()} and {spread.tolist()}; "
            "elsewhere there is no stationary state"
        )
    pace = lr * h
    return torch.where(pace < 2, pace * spread / (2 - pace), math.inf)


@of_their_kind
def variance_ratio(weights: Tensor, *, lr: float, curvature: float | Tensor) -> Tensor:
    """Stationary variance of an average of iterates, as a share of that of the last one: sum_ij w_i w_j rho^|i - j|.

    For the exponential average in the long run (1 - b)(1 + b rho) / ((1 + b)(1 - b rho)), for two points k apart
    (1 + rho^k) / 2.

    Args:
        weights: Of the iterates, (T + 1,), with sum 1.
        lr: The rate.
        curvature: h, or several (m,).
    """
    weights = _checked(weights)
    rho = 1 - lr * in_float64(curvature)
    total, before = torch.zeros_like(rho), torch.zeros_like(rho)  # before: sum_{i < j} w_i rho^(j - i)
    for weight in weights:
        total = total + weight * (weight + 2 * before)
        before = rho * (before + weight)
    return total


@of_their_kind
def squared_distance(spacing: int | Tensor, *, lr: float, curvatures: Tensor, noise: float | Tensor = 1.0) -> Tensor:
    """Expected squared distance of two iterates at stationarity: sum_i 2 v_i (1 - rho_i^spacing), v_i their variances.

    Measured against the spacing it gives the time scales of a run without its Hessian.

    Args:
        spacing: Steps between them, or several (n,).
        lr: The rate.
        curvatures: h_i > 0, (m,).
        noise: s_i^2, one for all or (m,).
    """
    if not isinstance(spacing, Tensor):
        whole_number("spacing", spacing, least=0, most=2**63 - 1)
    steps: Tensor = in_float64(spacing)
    check_vectors(curvatures=curvatures)
    if isinstance(noise, Tensor) and noise.ndim:
        check_vectors(len(curvatures), noise=noise)
    variances = stationary_variance(lr=lr, curvature=curvatures, noise=noise)
    kept: Tensor = (1 - lr * curvatures.double()) ** steps[..., None]
    total: Tensor = (2 * variances * (1 - kept)).sum(-1)
    return total


@of_their_kind
def two_point_loss(losses: Sequence[float] | Tensor, *, curvature: float | Tensor) -> Tensor:
    """Loss at the mean of two points: (L_a + L_b) / 2 - d^T H d / 8, exact for a quadratic.

    Args:
        losses: L_a and L_b.
        curvature: d^T H d, with d the difference of the points: one Hessian-vector product.
    """
    ends: Tensor = in_float64(losses)
    return ends.mean() - in_float64(curvature) / 8


def _ahead(weights: Tensor, rho: Tensor) -> Tensor:
    """What a unit move at each step t leaves in the average, (..., T): e_t = sum of w_k rho^(k - 1 - t) over k > t."""
    found = torch.zeros((*rho.shape, len(weights) - 1), dtype=torch.float64, device="cpu")
    ahead = torch.zeros_like(rho)
    for t in range(len(weights) - 2, -1, -1):
        ahead = weights[t + 1] + rho * ahead
        found[..., t] = ahead
    return found


def _check(steps: int) -> None:
    whole_number("steps", steps, least=0, most=2**31 - 1)


def _checked(weights: Tensor) -> Tensor:
    weights = weights.double()
    if weights.ndim != 1 or len(weights) == 0 or not abs(float(weights.sum()) - 1) < 1e-6:
        raise ValueError(
            f"expected weights (T + 1,) of the iterates with sum 1, got shape {tuple(weights.shape)} and sum "
            f"{float(weights.sum()):g}"
        )
    return weights
