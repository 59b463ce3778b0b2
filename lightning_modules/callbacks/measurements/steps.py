"""What limits an optimizer's steps: learning rate, momentum and damping, read off its parameter groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import SGD, Optimizer

from nsgd.damping.step import Damped

Groups = list[tuple[Optimizer, dict[str, Any]]]  # of parameters, with the optimizers that they belong to


def groups_of(optimizers: Sequence[Optimizer], params: Sequence[nn.Parameter]) -> Groups:
    """The groups of the optimizers that hold some of these parameters."""
    followed = set(params)
    return [(o, g) for o in optimizers for g in o.param_groups if not followed.isdisjoint(g["params"])]


def momentum_of(groups: Groups) -> float | None:
    """The momentum, where all step as heavy-ball SGD does at one rate; None where stable steps have another limit."""
    plain = all(isinstance(o, SGD) and not (g["nesterov"] or g["dampening"] or g["maximize"]) for o, g in groups)
    rates = {(float(g["lr"]), float(g.get("momentum", 0.0))) for _, g in groups}
    return rates.pop()[1] if plain and len(rates) == 1 else None


def damping_of(groups: Groups) -> tuple[Damped, float] | None:
    """The optimizer and its gamma, where that is all its damping; None before it has directions, or without damping."""
    optimizer = groups[0][0]
    if not (isinstance(optimizer, Damped) and optimizer.weights and all(o is optimizer for o, _ in groups)):
        return None
    factors = {(float(g["gamma"]), float(g["bulk_scale"])) for _, g in groups if g["curvature"]}
    gamma, bulk_scale = factors.pop() if len(factors) == 1 else (-1.0, 1.0)
    return (optimizer, gamma) if gamma >= 0 and bulk_scale == 1 else None  # else M has no root, or is another
