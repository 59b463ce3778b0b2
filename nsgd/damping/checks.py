"""Checks of what a damped optimizer is asked to follow: its groups, and its parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torch.optim import LBFGS

from nsgd.curvature.checks import is_real, plain, shown
from nsgd.curvature.vectors import checked_params
from nsgd.damping.damage import check_followed_flag
from nsgd.damping.state import SHARED, group_key
from nsgd.directions.shards import check_shards, is_sharded
from nsgd.options import FROM_TRAINING, check_factors

if TYPE_CHECKING:
    from nsgd.damping.step import Damped


def check_rate(name: str, value: Any, where: str = "") -> None:
    """Raise a ValueError unless this is a number of at least 0, or a tensor of one, which only the device may know."""
    fits = value.numel() == 1 if isinstance(value, Tensor) else is_real(plain(value)) and value >= 0
    if not fits:
        raise ValueError(f"expected {name} >= 0, got {shown(value)}{where}")


def check_group_factors(optimizer: Damped, group: dict[str, Any]) -> None:
    """Raise a ValueError where a group's gamma or bulk scale is out of range."""
    check_factors(*(group[group_key(optimizer, name)] for name in ("gamma", "bulk_scale")))


def checked_groups(params: Any) -> Any:
    """What an optimizer is to train, with iterators as lists; a ValueError where something else is in it."""
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        return params  # of which torch says what it is
    found = list(params.items() if isinstance(params, dict) else params)
    if any(isinstance(group, dict) for group in found):
        return [checked_group_shape(group) for group in found]
    _check_members(found)
    return found


def checked_group_shape(group: Any) -> dict[str, Any]:
    """A group with its parameters as a list; a ValueError unless this is a dictionary with parameters in it."""
    if not isinstance(group, dict) or not isinstance(group.get("params"), Iterable):
        raise ValueError(f"expected a group of parameters and options, {{'params': ...}}, got {shown(group)}")
    params = group["params"]
    if isinstance(params, Tensor | set):  # of which torch takes the one, and says what is wrong with the other
        return group
    found = list(params)
    _check_members(found)
    return {**group, "params": found}


def _check_members(params: Iterable[Any]) -> None:
    """Raise a ValueError unless these are tensors, or pairs of a name and a tensor."""
    for member in params:
        named = isinstance(member, tuple) and len(member) == 2 and isinstance(member[0], str)
        if not isinstance(member[1] if named else member, Tensor):
            raise ValueError(f"expected parameters, got {shown(member)} among them; pass model.parameters()")


def check_group(optimizer: Damped, group: dict[str, Any]) -> None:
    """Raise a ValueError where a group cannot be damped, or differs in what is one value for the whole optimizer."""
    check_group_factors(optimizer, group)
    check_followed_flag(group[group_key(optimizer, "curvature")])
    if group.get("differentiable", False):
        raise ValueError("expected differentiable=False: a damped step is not differentiable, got True")
    lr = group.get("lr", 0)
    check_rate("lr", lr, " for a group")
    options = optimizer._directions.options
    shared = {name: getattr(options, name) for name in SHARED if name not in optimizer.defaults}
    shared["maximize"] = optimizer.param_groups[0].get("maximize")
    for name, value in shared.items():
        here = plain(group.get(name, value))
        if isinstance(here, Tensor | np.ndarray) or here != value:
            raise ValueError(
                f"{name} is one value for the whole optimizer, {value!r}, got {shown(here)} for "
                "one group; gamma, bulk_scale and curvature may differ between groups"
            )


def check_followed(optimizer: Damped, params: list[Tensor]) -> None:
    """Raise a ValueError where an optimizer that is damped from now on has no parameters that it can follow."""
    options = optimizer._directions.options
    if not params:
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        raise ValueError(
            f"none of the {count} parameters requires a gradient in a group with curvature=True; unfreeze some "
            "with requires_grad_()"
        )
    checked_params(params)
    check_shards(params)
    if options.solver not in FROM_TRAINING and any(map(is_sharded, params)):
        raise ValueError(
            f"expected solver='differences' for sharded parameters, got {options.solver!r}: no process holds the "
            "vectors that the others need; leave it out, or train with DistributedDataParallel"
        )
    if isinstance(optimizer, LBFGS) and any(p.dtype.itemsize < 4 for p in params):
        raise ValueError("expected float32 or float64 parameters for L-BFGS, got half precision; convert them first")
