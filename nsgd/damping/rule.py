"""The arithmetic of a damped step, on blocks of parameters: measure what the optimizer did, and rescale it.

    step <- s * step + V (Gamma - s) V^T step        Gamma_i = gamma where direction i is damped, else 1

Each line of it takes a launch or two a block, however many parameters that has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nsgd.curvature.guard import full_precision
from nsgd.directions.flat import Block, Span, like
from nsgd.directions.shards import parts_of, totals


@torch.no_grad()
@full_precision
def project(blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
    """Coefficients (k,) of the blocks' steps in the basis, and the squared norm; one pass over the basis, no host sync.

    Args:
        blocks: With the step in each one's ``step``. The results are where the first one is.
    """
    coefficients, squared_norm = [], []
    for block in blocks:
        step, _ = block.step
        coefficients.append(like(block.basis @ like(step, block.basis), blocks[0].step[0]))
        squared_norm.append(like(torch.dot(step, step), blocks[0].step[0]))
    total, square = totals([block.params[0] for block in blocks], coefficients, squared_norm)
    return torch.nan_to_num_(total, nan=0.0, posinf=0.0, neginf=0.0), square


@torch.no_grad()
@full_precision
def correct(
    block: Block, entries: slice, views: list[Tensor], params: list[Tensor], factors: Tensor, bulk_scale: float
) -> None:
    """Bring some parameters of a block from the base step to the damped one; one pass over the basis, no host sync.

    Args:
        block: With the base step in its ``step``, which is overwritten by the change.
        entries: Where the parameters lie in it.
        views: Of its step, like the parameters.
        params: Parameters that have taken the base step.
        factors: Coefficients of the change in the basis, (k,).
        bulk_scale: Factor on the step outside the basis.
    """
    step, basis = block.step[0], block.basis
    if entries != slice(0, block.size):
        step, basis = step[entries], basis[:, entries]
    if basis.dtype == step.dtype:
        torch.addmv(step, basis.t(), like(factors, step), beta=bulk_scale - 1, out=step)
    else:
        step.mul_(bulk_scale - 1).add_(like(factors, basis) @ basis)
    # Not finite in the basis or in the step adds nothing: training goes on as the base optimizer would.
    step.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    torch._foreach_add_(params, views)


@torch.no_grad()
def sgd_step(
    block: Block, span: Span, there: Sequence[bool], group: Mapping[str, Any], state: Mapping[Tensor, Any]
) -> None:
    """Write into ``step`` what ``torch.optim.SGD``, without Nesterov, has just added to the parameters of a group.

    With momentum that is the buffer, without it the gradient. The decayed parameter is the one before the step,
    p + lr d; solved for d. (Nesterov's ``foreach`` changes gradients in place, other implementations do not.)

    Args:
        block: The block.
        span: The group's part of it.
        there: For each parameter of the block whether it took the step; along the others ``step`` stays as it is.
        group: The group's options.
        state: The optimizer's.
    """
    flat, views = block.step
    places = [i for i in range(span.params.start, span.params.stop) if there[i]]
    if not places:
        return
    params, targets = [block.params[i] for i in places], [views[i] for i in places]
    decay, lr = group["weight_decay"], group["lr"]
    if group["momentum"] != 0:
        torch._foreach_copy_(targets, parts_of([state[p]["momentum_buffer"] for p in params]))
        factor = -lr
    else:
        torch._foreach_copy_(targets, parts_of([p.grad for p in params]))
        if decay != 0:
            torch._foreach_add_(targets, parts_of(params), alpha=-decay if group["maximize"] else decay)
        factor = -lr / (1 - lr * decay)
        if group["maximize"]:
            factor = -factor
    (flat if span.entries == slice(0, block.size) else flat[span.entries]).mul_(factor)


@contextmanager
def in_float32(params: list[Tensor], state: dict[Tensor, Any]) -> Iterator[None]:
    """Hold half-precision parameters, with gradient and state, in float32, and round each once at the end.

    Measured from rounded parameters a damped step is mostly rounding error.
    """
    low = [p for p in params if p.dtype.itemsize < 4]
    rounded = {p: p.data for p in low}
    grads = {p: p.grad for p in low}
    names = {p: set(state.get(p, {})) for p in low}
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
                elif isinstance(value, Tensor) and name not in names[p] and value.shape == p.shape and p.ndim > 0:
                    state[p][name] = value.to(p.dtype)  # made in this step, as large as the parameter: as torch would


def _is_low(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4
