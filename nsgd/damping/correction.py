"""The correction of one step: what the base optimizer did is measured, or read from its state, and rescaled."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsgd.damping.rule import correct, in_float32, project, sgd_step
from nsgd.damping.state import group_key
from nsgd.directions.alarm import jump
from nsgd.directions.differences import chosen
from nsgd.directions.flat import Block
from nsgd.directions.processes import flag_of_the_first

if TYPE_CHECKING:
    from nsgd.damping.step import Damped


class Correction:
    """One step of a damped optimizer: :meth:`prepare` comes before the base step, and :meth:`apply` after it.

    Args:
        optimizer: Whose step it is.
        guards: Takes what has to stand around the base step, and is open until the step is done.
        steps_as_sgd: Whether the code of the base step is that of ``torch.optim.SGD``.
    """

    def __init__(self, optimizer: Damped, guards: ExitStack, *, steps_as_sgd: bool) -> None:
        self._optimizer, self._guards, self._steps_as_sgd = optimizer, guards, steps_as_sgd
        # Blocks that are damped, and which of their parameters take part; None before the base step.
        self._moving: list[tuple[Block, list[bool]]] | None = None
        self._measured = False

    def prepare(self) -> None:
        """Look at the gradients, and keep the parameters as they are where the step has to be measured."""
        if self._moving is not None:  # a closure may be called more than once
            return
        optimizer = self._optimizer
        self._moving = self._look()
        params = [p for block, there in self._moving for p in chosen(block.params, there)]
        if params and self._has_effect():
            self._guards.enter_context(in_float32(params, optimizer.state))
        self._measured = bool(params) and not self._is_known(params)
        for block, there in self._moving if self._measured else ():
            if any(there):
                with torch.no_grad():
                    torch._foreach_copy_(chosen(block.step[1], there), chosen(block.parts, there))

    def apply(self) -> None:
        """Damp the step that the base optimizer took."""
        if not self._moving or not any(block.sharded or any(there) for block, there in self._moving):
            return
        directions, groups = self._optimizer._directions, self._optimizer.param_groups
        with torch.no_grad():
            for block, there in self._moving:
                if self._measured:
                    if any(there):
                        torch._foreach_sub_(chosen(block.step[1], there), chosen(block.parts, there))  # old - new
                    block.step[0].neg_()
                else:
                    for span in block.spans:
                        sgd_step(block, span, there, groups[span.group], self._optimizer.state)
            coefficients, squared_norm = project([block for block, _ in self._moving])
            directions.last_step.update(coefficients=coefficients, squared_norm=squared_norm)
            if directions.differences is None and directions.options.refresh_every == "auto":
                last = directions.last_step.get("mean_square")
                jumped, mean = jump(coefficients, squared_norm, groups[0].get("lr", 1.0), last)
                directions.last_step["mean_square"] = mean
                directions.alarm.note(flag_of_the_first(jumped))
            for block, there in self._moving:
                self._correct(block, there, coefficients)

    def _look(self) -> list[tuple[Block, list[bool]]]:
        """Look at the gradients; the blocks with directions, and which of their parameters take the step."""
        optimizer = self._optimizer
        directions = optimizer._directions
        with torch.no_grad():
            blocks = directions.arrange(optimizer._curvature_params())
            scale, skipped = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
            directions.note_gradients(scale, skipped)
            directions.last_step.pop("coefficients", None)
            if not directions.rank or not blocks:
                return []
            moving = [(block, [p.grad is not None for p in block.params]) for block in blocks]
            for block, there in moving:
                if not all(there):
                    block.step[0].zero_()
        return moving

    def _is_known(self, params: list[Tensor]) -> bool:
        """Whether the base step is that of ``torch.optim.SGD``, and can be read from what it leaves behind."""
        optimizer = self._optimizer
        scaled = getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None
        if not self._steps_as_sgd or scaled:
            return False
        if not all(_is_simple(group) for group in optimizer.param_groups):
            return False
        listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
        if len(set(listed)) < len(listed):  # the base optimizer moves a parameter as often as it is listed
            return False
        return all(p.grad is not None and p.grad.layout == torch.strided for p in params)

    def _correct(self, block: Block, there: list[bool], coefficients: Tensor) -> None:
        """Damp the step of a block, all groups of one factor at once."""
        first = 0
        factors = [self._factors(self._optimizer.param_groups[span.group]) for span in block.spans]
        for last in range(len(block.spans)):
            if last + 1 < len(block.spans) and factors[last + 1] == factors[first]:
                continue
            spans, factor = block.spans[first : last + 1], factors[first]
            first = last + 1
            if factor is None:
                continue
            gamma, bulk_scale = factor
            entries = slice(spans[0].entries.start, spans[-1].entries.stop)
            members = slice(spans[0].params.start, spans[-1].params.stop)
            views, params = (chosen(items[members], there[members]) for items in (block.step[1], block.parts))
            if params:
                change = coefficients * (self._gammas(gamma, coefficients) - bulk_scale)
                correct(block, entries, views, params, change, bulk_scale)

    def _gammas(self, gamma: float, coefficients: Tensor) -> float | Tensor:
        """Factors on the step along the directions: gamma, or (k,), 1 where a direction is not damped."""
        damped = self._optimizer._directions.damped
        return gamma if damped is None else torch.ones_like(coefficients).masked_fill_(damped, gamma)

    def _factors(self, group: dict[str, Any]) -> tuple[float, float] | None:
        """Gamma and bulk scale of a group; None where the step stays as it is."""
        gamma, bulk_scale = (group[group_key(self._optimizer, name)] for name in ("gamma", "bulk_scale"))
        return None if at_rest(group) or (gamma == 1 and bulk_scale == 1) else (gamma, bulk_scale)

    def _has_effect(self) -> bool:
        """Whether any group is damped at all."""
        names = [group_key(self._optimizer, name) for name in ("gamma", "bulk_scale")]
        return any(any(group[name] != 1 for name in names) for group in self._optimizer._curvature_groups())


def at_rest(group: dict[str, Any]) -> bool:
    """Whether the base step moves nothing there, as far as the host knows."""
    lr = group.get("lr")
    return not isinstance(lr, Tensor) and lr == 0


def _is_simple(group: dict[str, Any]) -> bool:
    """Whether the step of ``torch.optim.SGD`` in this group can be told from what it leaves behind."""
    lr, decay = group["lr"], group["weight_decay"]
    if group["nesterov"] or isinstance(decay, Tensor):
        return False
    # Without momentum the decayed parameter is divided by 1 - lr * decay.
    return bool(group["momentum"] != 0 or decay == 0 or (not isinstance(lr, Tensor) and lr * decay < 0.5))
