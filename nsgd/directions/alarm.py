"""Notice, from what a step already knows, that a sharp direction has escaped the basis; without waiting for the device.

Where the rate is too high for a direction outside the basis, the step grows along it by a factor a step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nsgd.directions.on_host import OnHost

# A step whose square outside the basis is more than this many times its mean of late has left it. Batches alone make
# that square vary by less than a factor of two, and an unstable direction passes any threshold within steps.
_ALARM = 4.0
_MEMORY = 0.9
_ROUNDING = 1e-5  # what rounding leaves outside of a step that is wholly inside, as a share of its square


def jump(coefficients: Tensor, squared_norm: Tensor, lr: float | Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
    """Whether a step has left the basis, and the running mean of its square outside, over lr^2; no host sync.

    Steps of length zero, at a rate of zero or without a gradient, count for nothing.

    Args:
        coefficients: Of the step in the basis, (k,).
        squared_norm: Of the step.
        lr: The learning rate of the step, so that a schedule is not taken for an escape.
        last: The mean before it.
    """
    outside = torch.maximum(squared_norm - coefficients.square().sum(), _ROUNDING * squared_norm)
    outside = torch.where(squared_norm > 0, outside / lr**2, math.nan)
    last = outside if last is None else last.to(outside)
    jumped = outside > _ALARM * last
    mean = torch.where(jumped | ~last.isfinite(), outside, torch.lerp(outside, last, _MEMORY))
    return jumped, torch.where(outside.isfinite(), mean, last)


class Alarm:
    """Whether a step has left the basis: at once on the CPU, one step late elsewhere, where the last is under way."""

    def __init__(self, on: bool = False) -> None:
        self._on = on
        self._copies: list[OnHost] = []

    def note(self, jumped: Tensor) -> None:
        """Take in the last step."""
        late = [] if jumped.device.type == "cpu" else self._copies[-1:]
        self._copies = [*late, OnHost(jumped)]

    def is_on(self) -> bool:
        """Whether the last step known here has left the basis."""
        return self._copies[0].is_true() if self._copies else self._on
