"""The arithmetic of a damped step, on blocks of parameters: measure what the optimizer did, and rescale it.

step <- s * step + V (Gamma - s) V^T step        Gamma_i = gamma where eigenvalue i is positive, else 1
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nsgd.curvature.guard import full_precision

Move = tuple[Tensor, Tensor, float | Tensor]  # a parameter, a direction (*shape), and its factor in the step


@torch.no_grad()
@full_precision
def project(moves: Iterable[Move], directions: Mapping[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Coefficients of a step in the basis, (k,), and its squared norm; one pass over the basis, no host sync.

    Args:
        moves: Parameters, each with what the step added to it: a factor times a direction.
        directions: Parameter to its block of the basis, (k, *shape).
    """
    coefficients, squares = [], []
    for p, direction, factor in moves:
        flat = direction.to(directions[p].dtype).reshape(-1)
        coefficients.append((rows(directions[p]) @ flat) * factor)  # (k,)
        squares.append(torch.dot(flat, flat) * factor**2)
    dtype = max((c.dtype for c in coefficients), key=lambda d: d.itemsize)
    device = coefficients[0].device
    total = torch.stack([c.to(device=device, dtype=dtype) for c in coefficients]).sum(0)
    return _finite(total), torch.stack([s.to(device=device, dtype=dtype) for s in squares]).sum()


@torch.no_grad()
@full_precision
def correct(params: Iterable[Tensor], directions: Mapping[Tensor, Tensor], factors: Tensor) -> None:
    """Add to parameters the vector with these coefficients in the basis; one pass over it, no host sync.

    Args:
        params: Parameters that have taken their step.
        directions: Parameter to its block of the basis, (k, *shape).
        factors: Coefficients, (k,).
    """
    for p in params:
        # Not finite in the basis or in the step adds nothing: training goes on as the base optimizer would.
        change = factors.to(directions[p]) @ rows(directions[p])
        p.add_(change.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).view_as(p))


@torch.no_grad()
def sgd_moves(params: Iterable[Tensor], group: Mapping[str, Any], state: Mapping[Tensor, Any]) -> Iterator[Move]:
    """What the last step of ``torch.optim.SGD``, without Nesterov, added to each parameter, from what it left behind.

    With momentum that is the buffer, without it the gradient: no copy of the parameters is needed, nor of anything else
    but for weight decay. The decayed parameter is the one before the step, p + lr d; solved for d. (Nesterov's
    ``foreach`` changes gradients in place, other implementations do not.)
    """
    decay, lr = group["weight_decay"], group["lr"]
    for p in params:
        if group["momentum"] != 0:
            yield p, state[p]["momentum_buffer"], -lr
            continue
        gradient: Any = p.grad
        direction: Tensor = -gradient if group["maximize"] else gradient
        if decay == 0:
            yield p, direction, -lr
        else:
            yield p, direction + decay * p, -lr / (1 - lr * decay)


@full_precision
def cosines(bases: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Inner products of two bases, (k, k), given as blocks (k, *shape) of each, parameter by parameter."""
    return torch.stack([(rows(old) @ rows(new).T).cpu().double() for old, new in bases]).sum(0)


def rows(block: Tensor) -> Tensor:
    """A block (k, *shape) as (k, entries), also where the parameter is a scalar or empty."""
    return block.reshape(len(block), math.prod(block.shape[1:]))


def _finite(tensor: Tensor) -> Tensor:
    return torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0)


@contextmanager
def in_float32(params: list[Tensor], state: dict[Tensor, Any]) -> Iterator[None]:
    """Hold half-precision parameters, with gradient and state, in float32, and round each once at the end.

    Measured from rounded parameters a damped step is mostly rounding error.
    """
    low = [p for p in params if p.dtype.itemsize < 4]
    rounded = {p: p.data for p in low}
    grads = {p: p.grad for p in low}
    found = {p: set(state.get(p, {})) for p in low}
    dtypes = {p: {name: v.dtype for name, v in state.get(p, {}).items() if _is_low(v)} for p in low}
    for p in low:
        p.data = p.data.float()
        p.grad = None if p.grad is None else p.grad.float()
        for name in dtypes[p]:
            state[p][name] = state[p][name].float()
    try:
        yield
    finally:
        for p in low:
            p.data = rounded[p].copy_(p.data)
            p.grad = grads[p]
            for name, value in state.get(p, {}).items():
                if name in dtypes[p]:
                    state[p][name] = value.to(dtypes[p][name])
                elif isinstance(value, Tensor) and name not in found[p] and value.shape == p.shape and p.ndim > 0:
                    state[p][name] = value.to(p.dtype)  # made in this step, as large as the parameter: as torch would


def _is_low(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4
