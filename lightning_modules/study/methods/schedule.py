"""How the learning rate of every method of a study goes along its runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal, get_args

import torch

from lightning_modules.callbacks.averages import average_weights
from lightning_modules.support.nearest import meant
from lightning_modules.support.read_outs import average
from nsgd.trajectory.averaging import tail_sums

_Name = Literal["constant", "cosine", "linear", "trapezoid", "plateau"]

_COOLDOWN = 0.2  # of a trapezoid that does not say


@dataclass(frozen=True)
class Schedule:
    """A factor on the learning rate, step by step: up from zero in a straight line, then on or down to zero.

    Args:
        name: What follows the warm-up: constant; cosine to zero; linear to zero; trapezoid, constant and at the end
            linear to zero (Xing et al. 2018, arXiv 1802.08770); or plateau, a tenth each time that ``patience`` epochs
            in a row brought no lower validation loss (Jastrzebski et al. 2019, arXiv 1807.05031).
        warmup: Share of the run's steps that the warm-up takes, for example 0.05.
        average: Name of an average, as ``averages`` takes it, that the last weights are to equal: the factor above is
            multiplied by the share of the average that lies ahead of each step. To first order in rate times curvature
            the last weights are then that average of a run without it (Sandler et al. 2023, arXiv 2301.02312).
        cooldown: Share of the run's steps that a trapezoid falls in; null for 0.2, and for other names.
        patience: Epochs in a row without a lower validation loss after which a plateau ends; null for other names.
    """

    name: _Name = "constant"
    warmup: float = 0.0
    average: str | None = None
    cooldown: float | None = None
    patience: int | None = None

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
        self._check_plateau()
        if self.name != "trapezoid":
            if self.cooldown is not None:
                raise ValueError(
                    f"expected schedule.cooldown with the name trapezoid alone, got it with {self.name}; leave it out"
                )
        elif not self._cooldown > 0 or self.warmup + self._cooldown > 1:
            raise ValueError(
                "expected schedule.cooldown to be a share of the run's steps above 0, and at most the "
                f"{1 - self.warmup:g} that the warm-up leaves, got {self._cooldown:g}; give 0.2 for 20 % of them"
            )

    def _check_plateau(self) -> None:
        if self.name != "plateau":
            if self.patience is not None:
                raise ValueError(
                    f"expected schedule.patience with the name plateau alone, got it with {self.name}; leave it out"
                )
            return
        if self.patience is None or self.patience < 1:
            raise ValueError(
                "expected schedule.patience of a plateau to be a number of epochs of at least 1, got "
                f"{self.patience}; give 10 for a rate that falls after ten epochs without a lower validation loss"
            )
        if self.warmup or self.average is not None:
            other = "warmup" if self.warmup else "average"
            raise ValueError(
                f"expected no schedule.{other} with a plateau, whose rate goes by validation and not by steps, got "
                f"{getattr(self, other)}; leave it out"
            )

    @property
    def _cooldown(self) -> float:
        """Share of the steps that a trapezoid falls in."""
        return _COOLDOWN if self.cooldown is None else self.cooldown

    def resolved(self) -> dict[str, Any]:
        """Its options as plain values; as a file has them they are this schedule."""
        values = asdict(self)
        for name in ("cooldown", "patience"):  # which files of before do not have
            if values[name] is None:
                del values[name]
        return values

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
        for share in ("warmup", "cooldown"):
            value = options.get(share, 0.0)
            absent = share == "cooldown" and value is None
            if not absent and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ValueError(f"expected schedule.{share} to be a number, got {value!r}")
        patience = options.get("patience")
        if isinstance(patience, bool) or not isinstance(patience, int | None):
            raise ValueError(f"expected schedule.patience to be a whole number, got {patience!r}")
        schedule = Schedule(**options)
        schedule.check()
        return schedule

    def factor(self, step: int, steps: int) -> float:
        """What the rate is multiplied by; 1 throughout for a plateau, which no steps tell.

        Args:
            step: Steps that were made already.
            steps: Steps of the whole run.
        """
        ahead = 1.0 if self.average is None or steps < 1 else _shares_ahead(self.average, steps)[min(step, steps - 1)]
        rising = round(self.warmup * steps)
        if step < rising:
            return ahead * (step + 1) / rising
        done = min(1.0, (step - rising) / max(1, steps - rising))
        falling = round(self._cooldown * steps)
        falls = {
            "constant": 1.0,
            "plateau": 1.0,
            "cosine": (1 + math.cos(math.pi * done)) / 2,
            "linear": 1 - done,
            "trapezoid": min(1.0, max(0, steps - step) / max(1, falling)),
        }
        return ahead * falls[self.name]

    @property
    def label(self) -> str:
        """What it is called in print."""
        falls = "" if self.average is None else f", falling as {average(self.average).label} does"
        warmup = f", after a warm-up of {100 * self.warmup:g} % of the steps" if self.warmup else ""
        cooldown = f", cool-down {100 * self._cooldown:g} %" if self.name == "trapezoid" else ""
        patience = f" of {self.patience} epochs" if self.name == "plateau" else ""
        return f"{self.name}{patience}{cooldown}{falls}{warmup}"

    def configured(self, optimizer: torch.optim.Optimizer, steps: int) -> dict[str, Any]:
        """What ``configure_optimizers`` returns: the optimizer, and this schedule, which Lightning steps with it.

        A plateau goes by validation, so :class:`lightning_modules.callbacks.plateau.ReduceOnPlateau` sees to it.
        """
        if self.name == "plateau":
            return {"optimizer": optimizer}
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.factor(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


@lru_cache(maxsize=64)
def _shares_ahead(name: str, steps: int) -> list[float]:
    """Of each step, what the weights after it count in an average, which is what its gradient counts in it."""
    shares: list[float] = tail_sums(average_weights(average(name), steps)).tolist()
    return shares
