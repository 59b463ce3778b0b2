"""The arithmetic of a damped step, on blocks of parameters: measure what the optimizer did, and rescale it.

step <- s * step + V (Gamma - s) V^T step        Gamma_i = gamma where eigenvalue i is positive, else 1
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def project(moves: Mapping[Tensor, Tensor], directions: Mapping[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Coefficients of a step in the basis, (k,), and its squared norm; no host sync.

    Args:
        moves: Parameter to what the step added to it, (*shape).
        directions: Parameter to its block of the basis, (k, *shape).
    """
    first = next(iter(moves))
    dtype = max((directions[p].dtype for p in moves), key=lambda d: d.itemsize)
    coefficients = torch.zeros(len(directions[first]), dtype=dtype, device=first.device)  # (k,): V^T step
    squared_norm = torch.zeros((), dtype=dtype, device=first.device)
    for p, move in moves.items():
        flat = move.to(directions[p].dtype).reshape(-1)
        coefficients += (rows(directions[p]) @ flat).to(coefficients)
        squared_norm += torch.dot(flat, flat).to(squared_norm)
    return _finite(coefficients), squared_norm


@torch.no_grad()
def correct(
    moves: Mapping[Tensor, Tensor],
    directions: Mapping[Tensor, Tensor],
    coefficients: Tensor,
    positive: Tensor,
    gamma: float,
    bulk_scale: float,
) -> None:
    """Turn the step that parameters have taken into the damped one, in place; no host sync.

    Args:
        moves: Parameter to what the step added to it, (*shape).
        directions: Parameter to its block of the basis, (k, *shape).
        coefficients: Of the whole step in the basis, (k,).
        positive: Which eigenvalues are positive, (k,).
        gamma: Factor along those directions.
        bulk_scale: Factor outside the basis.
    """
    if gamma == 1 and bulk_scale == 1:
        return
    gammas = torch.ones_like(coefficients).masked_fill(positive, gamma)  # (k,)
    factors = coefficients * (gammas - bulk_scale)
    for p, move in moves.items():
        # Not finite in the basis or in the step adds nothing: training goes on as the base optimizer would.
        p.add_(_finite(factors.to(directions[p]) @ rows(directions[p])).view_as(p))
        if bulk_scale != 1:
            p.add_(move, alpha=bulk_scale - 1)


def rows(block: Tensor) -> Tensor:
    """A block (k, *shape) as (k, entries), also where the parameter is a scalar or empty."""
    return block.reshape(len(block), block[0].numel())


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
