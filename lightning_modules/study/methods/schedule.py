"""How the learning rate of every method of a study goes along its runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

_Name = Literal["constant", "cosine", "linear"]


@dataclass(frozen=True)
class Schedule:
    """A factor on the learning rate, step by step: up from zero in a straight line, then on or down to zero.

    Args:
        name: What follows the warm-up: constant, cosine to zero, or linear to zero.
        warmup: Share of the run's steps that the warm-up takes, for example 0.05.
    """

    name: _Name = "constant"
    warmup: float = 0.0

    def check(self) -> None:
        """Raise a ValueError for a schedule that no run can follow."""
        if self.name not in get_args(_Name):
            raise ValueError(f"expected schedule.name to be one of {', '.join(get_args(_Name))}, got {self.name!r}")
        if not 0 <= self.warmup < 1:
            raise ValueError(
                "expected schedule.warmup to be a share of the run's steps, at least 0 and below 1, got "
                f"{self.warmup}, which is no part of a run; give 0.05 for 5 % of them"
            )

    def factor(self, step: int, steps: int) -> float:
        """What the rate is multiplied by.

        Args:
            step: Steps that were made already.
            steps: Steps of the whole run.
        """
        rising = round(self.warmup * steps)
        if step < rising:
            return (step + 1) / rising
        done = min(1.0, (step - rising) / max(1, steps - rising))
        return {"constant": 1.0, "cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done}[self.name]

    @property
    def label(self) -> str:
        """What it is called in print."""
        return f"{self.name}, after a warm-up of {100 * self.warmup:g} % of the steps" if self.warmup else self.name

    def configured(self, optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Any]:
        """What ``configure_optimizers`` returns: the optimizer, and this schedule, which Lightning steps with it."""
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}
