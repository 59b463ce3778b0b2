"""NSGD: ``torch.optim.SGD`` with its step scaled down along the sharpest directions of the loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import SGD
from torch.optim.optimizer import ParamsT

from nsgd.damping import Damped, damping_options
from nsgd.eigen import Solver, Which


class NSGD(Damped, SGD):
    """Nudged SGD (Jastrzębski et al., ICLR 2019): a drop-in ``torch.optim.SGD``.

    Call ``optimizer.backward(loss)`` in place of ``loss.backward()``: every ``refresh_every`` steps it estimates the
    top k eigenvectors of the loss's Hessian, and each step is scaled by ``gamma`` along them. Before the first
    refresh, or with ``gamma=1`` and ``bulk_scale=1``, the step is bitwise that of ``torch.optim.SGD``.

    A refresh takes up to 2k + 2 Hessian-vector products, each worth two gradients of the loss they come from. The
    basis takes k times the memory of the parameters.

    Args:
        params: Parameters or parameter groups, as for any torch optimizer. A group may have its own ``gamma`` and
            ``bulk_scale``, and ``curvature=False`` leaves it out of the directions: it trains as under SGD.
        lr: Learning rate.
        momentum: Momentum factor. The momentum buffer keeps the undamped velocity, as in the paper's released code.
        dampening: Dampening for momentum.
        weight_decay: Weight decay (L2 penalty).
        nesterov: Whether to use Nesterov momentum.
        maximize: Maximise the objective; the directions are then those of the negative Hessian.
        foreach: As in ``torch.optim.SGD``.
        differentiable: Refused: a damped step is not differentiable.
        fused: As in ``torch.optim.SGD``.
        k: Number of directions.
        gamma: Factor on the step along directions of positive curvature: 0 is Bulk-SGD, 1 is SGD, above 1 the
            paper's "overshoot".
        refresh_every: Steps between two refreshes.
        which: "LA" for the largest eigenvalues, "LM" for the largest in absolute value (the paper's choice), "SA"
            for the smallest. A direction whose eigenvalue is not positive is never damped.
        bulk_scale: Factor on the step outside the directions; 0 with ``gamma=1`` is Dom-SGD.
        solver: "lanczos", or "arpack", the paper's own solver.
        warmup_steps: Steps before the first refresh.
        save_basis: Whether ``state_dict`` holds the directions (k times the parameters). Without them a resumed
            run refreshes at its first step.

    Raises:
        ValueError: If an option is out of range, k exceeds the number of trainable parameters, or there are none.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        k: int = 10,
        gamma: float = 0.1,
        refresh_every: int = 100,
        which: Which = "LA",
        bulk_scale: float = 1.0,
        solver: Solver = "lanczos",
        warmup_steps: int = 0,
        save_basis: bool = True,
    ) -> None:
        options: dict[str, Any] = damping_options(
            k=k,
            gamma=gamma,
            refresh_every=refresh_every,
            which=which,
            bulk_scale=bulk_scale,
            solver=solver,
            warmup_steps=warmup_steps,
            save_basis=save_basis,
        )
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        self._begin_damping(options)
