"""How the learning rate of every method of a study goes along its runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal, get_args

import torch

from lightning_modules.callbacks.averages import average_weights
from lightning_modules.support.nearest import meant
from lightning_modules.support.read_outs import average
from nsgd.trajectory.averaging import tail_sums

_Name = Literal["constant", "cosine", "linear"]


@dataclass(frozen=True)
class Schedule:
    """A factor on the learning rate, step by step: up from zero in a straight line, then on or down to zero.

    Args:
        name: What follows the warm-up: constant, cosine to zero, or linear to zero.
        warmup: Share of the run's steps that the warm-up takes, for example 0.05.
        average: Name of an average, as ``averages`` takes it, that the last weights are to equal: the factor above is
            multiplied by the share of the average that lies ahead of each step. To first order in rate times curvature
            the last weights are then that average of a run without it (Sandler et al. 2023, arXiv 2301.02312).
    """

    name: _Name = "constant"
    warmup: float = 0.0
    average: str | None = None

    def check(self) -> None:
        """Raise a ValueError for a schedule that no run can follow."""
        if self.name not in get_args(_Name):
            raise ValueError(f"expected schedule.name to be one of {', '.join(get_args(_Name))}, got {self.name!r}")
        if not 0 <= self.warmup < 1:
            raise ValueError(
                "expected schedule.warmup to be a share of the run's steps, at least 0 and below 1, got "
                f"{self.warmup}, which is no part of a run; give 0.05 for 5 % of them"
            )
        if self.average is not None:
            average(self.average)

    @staticmethod
    def of(options: Mapping[str, Any]) -> Schedule:
        """The schedule of options as a file has them.

        Raises:
            ValueError: If there is no such option, or no run can follow it.
        """
        known = [field.name for field in fields(Schedule)]
        if unknown := [name for name in options if name not in known]:
            near = meant(str(unknown[0]), known)
            raise ValueError(f"expected schedule to have {', '.join(known)}, got {unknown[0]!r}{near}")
        if isinstance(warmup := options.get("warmup", 0.0), bool) or not isinstance(warmup, int | float):
            raise ValueError(f"expected schedule.warmup to be a number, got {warmup!r}")
        schedule = Schedule(**options)
        schedule.check()
        return schedule

    def factor(self, step: int, steps: int) -> float:
        """What the rate is multiplied by.

        Args:
            step: Steps that were made already.
            steps: Steps of the whole run.
        """
        ahead = 1.0 if self.average is None or steps < 1 else _shares_ahead(self.average, steps)[min(step, steps - 1)]
        rising = round(self.warmup * steps)
        if step < rising:
            return ahead * (step + 1) / rising
        done = min(1.0, (step - rising) / max(1, steps - rising))
        return ahead * {"constant": 1.0, "cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done}[self.name]

    @property
    def label(self) -> str:
        """What it is called in print."""
        falls = "" if self.average is None else f", falling as {average(self.average).label} does"
        warmup = f", after a warm-up of {100 * self.warmup:g} % of the steps" if self.warmup else ""
        return f"{self.name}{falls}{warmup}"

    def configured(self, optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Any]:
        """What ``configure_optimizers`` returns: the optimizer, and this schedule, which Lightning steps with it."""
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


@lru_cache(maxsize=64)
def _shares_ahead(name: str, steps: int) -> list[float]:
    """Of each step, what the weights after it count in an average, which is what its gradient counts in it."""
    shares: list[float] = tail_sums(average_weights(average(name), steps)).tolist()
    return shares
