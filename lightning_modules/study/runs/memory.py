"""What an optimizer holds between steps, beside the parameters that it trains."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor


def held_share(optimizers: Collection[torch.optim.Optimizer]) -> float:
    """Bytes of all tensors that optimizers hold between steps, over those of the parameters that they train.

    Momentum is 1, Adam's moments 2; a basis, its rows of differences and whatever else an optimizer keeps count as they
    lie in memory, each storage once. Parameters and their gradients, which every optimizer needs, are left out.
    """
    params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    given = {_place(t) for p in params for t in (p, p.grad) if t is not None}
    trained = sum({_place(p): _size(p) for p in params}.values())
    held: dict[int, int] = {}
    seen: set[int] = set()
    left: list[Any] = list(optimizers)
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, type | str | bytes | int | float | None):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            if _place(one) not in given:
                held[_place(one)] = _size(one)
        elif isinstance(one, Mapping):
            left += one.values()
        elif isinstance(one, Collection):
            left += one
        elif not callable(one):
            left += getattr(one, "__dict__", {}).values()
    return sum(held.values()) / trained if trained else 0.0


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _size(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
