"""The two ways to a damped optimizer: NSGD, which is ``torch.optim.SGD`` with the rule, and ``damp`` for any other."""

from __future__ import annotations

import weakref
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import ParamsT

from nsgd.curvature.hessian import Closure
from nsgd.curvature.low_rank import Which
from nsgd.damping.checks import check_rate, checked_groups
from nsgd.damping.step import Damped
from nsgd.options import DampingOptions, Estimator


class NSGD(Damped, SGD):
    """Nudged SGD (Jastrzębski et al., ICLR 2019): a drop-in ``torch.optim.SGD``.

    One line of a training loop changes, the one that makes the optimizer. Each step is scaled by ``gamma`` along the
    sharpest directions of the loss, which the optimizer learns from the gradients that it is given: the differences of
    successive gradients lie along the Hessian's outlying eigenvectors. That takes no closure, no second look at the
    loss and no gradient, and the step never waits for the device. These directions estimate the top eigenspace of the
    Hessian: on a small CNN they overlap its exact top 10 eigenvectors by 0.69 to 0.80, from micro-batches by 0.77
    to 0.90 (benchmarks/results/tracking.csv). For the eigenvectors themselves take ``solver="lanczos"``.

    Before the first directions, or with ``gamma=1`` and ``bulk_scale=1``, the step is bitwise that of
    ``torch.optim.SGD``. Memory between steps, in multiples of the parameters: k for the basis, 13 for rows of
    differences, the last gradients and the step.

    Where a step accumulates several backward passes, in one process, their deviations from the mean are taken in place
    of the difference: better directions, still at no gradient. :func:`nsgd.backward_in_chunks` cuts a batch into such
    passes. They cost a copy of each gradient in its pass, a fold in each step, and one vector of memory more.

    Better directions come from single samples or from the Hessian, at the price of a second look at the loss: call
    ``optimizer.backward(loss, curvature=...)`` in place of ``loss.backward()``. With
    ``curvature=nsgd.sample_losses(lambda x, y: loss_fn(model(x), y), x[:32], y[:32], module=model)`` and
    ``batch_fraction=len(x[:32]) / len(x)`` a refresh costs one gradient of those 32; from a loss or a closure it costs
    up to 2k + 2 Hessian-vector products, each worth two gradients.

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
        k: Number of directions, at most the entries of the parameters that train when the optimizer is made: more are
            cut down to that, with a warning. The default and that of ``gamma`` are from
            benchmarks/results/damping_rule.csv: 10 were too few at twice the rate of SGD, 40 better still, and with
            momentum 0 no better than 0.1 (without it, 0 bore a rate at which one of two runs at 0.1 had a jump of the
            loss).
        gamma: Factor on the step along directions of positive curvature: 0 is Bulk-SGD, 1 is SGD, above 1 the
            paper's "overshoot".
        refresh_every: For samples and products: steps between two refreshes, or "auto": as often as ``overhead`` pays.
        overhead: With "auto", what refreshes may cost, as a share of the seconds of the steps between them. The price
            of a refresh is measured over the first few, without waiting for the device. Then the interval is settled,
            once: the log of "nsgd" and ``refresh_interval`` tell it, checkpoints keep it, and as ``refresh_every`` it
            makes a run that can be repeated. Until then, and for solver "random", refreshes together cost ``overhead``
            gradients a step (``cost_gradients``): for 45 gradients of the whole batch, by products at k = 10, one comes
            every 450 steps. After a step that left the directions with more than twice its usual length, as when a
            sharp one has escaped them, they may cost twice as much.
        decay: For samples and products: share of the last directions in their running average with a new estimate, a
            refresh; 0 takes each estimate alone. None is 0.95 for samples and 0 for products
            (benchmarks/results/tracking.csv).
        step_decay: For differences: what an older one weighs in their running average, a step. 0.95 forgets too fast,
            0.99 lags behind more and is a little better at small batches (benchmarks/results/tracking.csv).
        which: For products: "LA" for the largest eigenvalues, "LM" for the largest in absolute value (the paper's
            choice), "SA" for the smallest. A direction whose weight is not positive is never damped.
        bulk_scale: Factor on the step outside the directions; 0 with ``gamma=1`` is Dom-SGD.
        solver: Where the directions come from. "differences" of training gradients. "gradients" of groups of samples;
            "lanczos", or "arpack", the paper's own, by products. "auto" is "differences" until the first ``refresh``,
            or ``backward`` with ``curvature``; from then on "gradients" where two groups or more are given, else
            "lanczos". "random" is the paper's control: fresh directions at each refresh, orthonormal, drawn without a
            look at the loss and at no gradient; as often as gradients of what it is given would be paid for. All but
            "auto" and "differences" need :meth:`backward`, :meth:`refresh_if_due` or :meth:`refresh`: without, no step
            is damped.
        warmup_steps: Steps before the first difference is taken, or the first refresh.
        save_basis: Whether ``state_dict`` holds the directions, k times the parameters, and what differences need, up
            to 12 times, at every step in the same shapes. Without them a resumed run begins its directions anew.
        basis_dtype: Precision of the basis, float32 by default (float64 for parameters in float64). ``torch.bfloat16``
            halves its memory; on a CPU it is slower.
        seed: Draws the directions of solver "random".

    Raises:
        ValueError: If an option is out of range, or no parameter trains.
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
        k: int = 20,
        gamma: float = 0.1,
        refresh_every: int | Literal["auto"] = "auto",
        overhead: float = 0.1,
        decay: float | None = None,
        step_decay: float = 0.98,
        which: Which = "LA",
        bulk_scale: float = 1.0,
        solver: Estimator = "auto",
        warmup_steps: int = 0,
        save_basis: bool = True,
        basis_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        options = DampingOptions(
            k=k,
            gamma=gamma,
            refresh_every=refresh_every,
            overhead=overhead,
            decay=decay,
            step_decay=step_decay,
            which=which,
            bulk_scale=bulk_scale,
            solver=solver,
            warmup_steps=warmup_steps,
            save_basis=save_basis,
            basis_dtype=basis_dtype,
            seed=seed,
        )
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            check_rate(name, value)
        super().__init__(
            checked_groups(params),
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


def damp(
    optimizer: Optimizer,
    *,
    k: int = 20,
    gamma: float = 0.1,
    refresh_every: int | Literal["auto"] = "auto",
    overhead: float = 0.1,
    decay: float | None = None,
    step_decay: float = 0.98,
    which: Which = "LA",
    bulk_scale: float = 1.0,
    solver: Estimator = "auto",
    warmup_steps: int = 0,
    save_basis: bool = True,
    basis_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Damped:
    """Put the rule on any torch optimizer, in place: its step is scaled down along the sharpest directions.

    Args:
        optimizer: For example ``torch.optim.AdamW(model.parameters())``. Nothing of it changes but its class,
            which becomes a subclass of the one it had; schedulers, hooks and state stay.
        k: Number of directions.
        gamma: Factor on the step along directions of positive curvature. A group may carry its own, as ``gamma``, or
            ``nsgd_gamma`` where the optimizer has an option of that name.
        refresh_every: For samples and products: steps between two refreshes, or "auto", as in :class:`nsgd.NSGD`.
        overhead: With "auto", what refreshes may cost, as a share of the seconds of the steps.
        decay: For samples and products: share of the last directions in their running average, a refresh.
        step_decay: For differences of training gradients: what an older one weighs in their average, a step.
        which: "LA", "LM" or "SA", for products.
        bulk_scale: Factor on the step outside the directions. A group may carry its own.
        solver: "auto", "differences", "gradients", "lanczos", "arpack" or "random", as in :class:`nsgd.NSGD`.
        warmup_steps: Steps before the first difference is taken, or the first refresh.
        save_basis: Whether ``state_dict`` holds the directions.
        basis_dtype: Precision of the basis.
        seed: Draws the directions of solver "random".

    Returns:
        The same object, with ``backward``, ``refresh`` and the diagnostics of :class:`nsgd.NSGD`.

    Raises:
        ValueError: If an option is out of range, or the optimizer is damped already or cannot be. It is then
            unchanged.
    """
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"expected a torch.optim.Optimizer, got a {type(optimizer).__name__}")
    if isinstance(optimizer, Damped):
        raise ValueError(f"expected an optimizer that is not damped yet, got a {type(optimizer).__name__}")
    settings = DampingOptions(
        k=k,
        gamma=gamma,
        refresh_every=refresh_every,
        overhead=overhead,
        decay=decay,
        step_decay=step_decay,
        which=which,
        bulk_scale=bulk_scale,
        solver=solver,
        warmup_steps=warmup_steps,
        save_basis=save_basis,
        basis_dtype=basis_dtype,
        seed=seed,
    )
    plain, attributes = optimizer.__class__, dict(vars(optimizer))
    groups = [dict(group) for group in optimizer.param_groups]
    optimizer.__class__ = _damped_class(plain)
    damped = cast(Damped, optimizer)
    try:
        damped._begin_damping(settings)
    except ValueError:
        optimizer.__class__ = plain
        vars(optimizer).clear()
        vars(optimizer).update(attributes)
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(before)
        raise
    damped._patch_step_function()
    if "step" in attributes:  # a scheduler wrapped the plain step, to see that it is called: wrap the new one
        _note_calls(damped)
    return damped


def _note_calls(optimizer: Damped) -> None:
    reference = weakref.ref(optimizer)
    del optimizer.step

    def step(closure: Closure | None = None) -> Any:
        damped = cast(Damped, reference())
        damped._opt_called = True  # type: ignore[attr-defined]
        return type(damped).step(damped, closure)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = step  # type: ignore[method-assign]


_DAMPED_CLASSES: dict[type[Optimizer], type[Optimizer]] = {}


def _damped_class(base: type[Optimizer]) -> type[Optimizer]:
    if base not in _DAMPED_CLASSES:
        members = {"__module__": __name__, "__reduce_ex__": _reduce}

        class Mixed(type(base)):  # type: ignore[misc]
            """Looks methods up in Damped first, though the base alone is its base.

            An object takes a class only of its own layout, which another base before an abstract one would change.
            """

            def mro(cls) -> list[type]:
                order = super().mro()
                # A wrapper that inherits from the damped class has Damped in its order already.
                return order if Damped in order else [cls, Damped, *order[1:]]

        _DAMPED_CLASSES[base] = Mixed(f"Damped{base.__name__}", (base,), members)
    return _DAMPED_CLASSES[base]


def _reduce(self: Damped, _: Any) -> Any:
    # The class is made at run time, so a pickle holds its base class, by name, and makes it again.
    return _blank, (type(self).__bases__[0],), self.__getstate__()


def _blank(base: type[Optimizer]) -> Optimizer:
    cls = _damped_class(base)
    return cls.__new__(cls)
