"""The options of the rule and of its directions, once, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import torch

from nsgd.curvature.checks import check_choice, is_real, plain, shown, whole_number
from nsgd.curvature.low_rank import Which

# Where directions come from; "auto" goes by what the optimizer is given.
Estimator = Literal["auto", "differences", "gradients", "lanczos", "arpack", "random"]

# Those that begin with the gradients of training, and need no refresh.
FROM_TRAINING: tuple[Estimator, ...] = ("auto", "differences")

# What a parameter group may have of its own.
PER_GROUP = ("gamma", "bulk_scale", "curvature")


@dataclass(frozen=True)
class DampingOptions:
    """Every option that NSGD has beside torch's; :class:`nsgd.NSGD` describes them.

    Raises:
        ValueError: If one is out of range, or two do not go together.
    """

    k: int = 20
    gamma: float = 0.1
    refresh_every: int | Literal["auto"] = "auto"
    overhead: float = 0.1
    decay: float | None = None
    step_decay: float = 0.98
    which: Which = "LA"
    bulk_scale: float = 1.0
    solver: Estimator = "auto"
    warmup_steps: int = 0
    save_basis: bool = True
    basis_dtype: torch.dtype | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("refresh_every", 1), ("warmup_steps", 0), ("seed", 0)):
            value = getattr(self, name)
            if name == "refresh_every" and isinstance(value, str) and value == "auto":
                continue
            kind = "'auto' or a whole number" if name == "refresh_every" else "a whole number"
            most = 2**63 - 1 if name == "seed" else None  # what a generator takes
            self._set(name, whole_number(name, value, least=least, most=most, kind=kind))
        for name in ("gamma", "bulk_scale", "overhead", "decay", "step_decay", "save_basis"):
            self._set(name, plain(getattr(self, name)))
        if not isinstance(self.save_basis, bool):
            raise ValueError(f"expected save_basis to be True or False, got {shown(self.save_basis)}")
        check_factors(self.gamma, self.bulk_scale)
        if not _is_number(self.overhead) or not 0 < self.overhead < math.inf:
            raise ValueError(
                "expected overhead to be a number above 0, the share of training that refreshes may cost, got "
                f"{shown(self.overhead)}"
            )
        for name in ("gamma", "bulk_scale", "overhead"):
            self._set(name, float(getattr(self, name)))
        for name in ("decay", "step_decay"):
            value = getattr(self, name)
            if name == "decay" and value is None:
                continue
            if not _is_number(value) or not 0 <= value < 1:
                default = "; None is the default" if name == "decay" else ""
                raise ValueError(f"expected {name} to be a number >= 0 and below 1, got {shown(value)}{default}")
            self._set(name, float(value))
        check_choice("which", self.which, Which)
        check_choice("solver", self.solver, Estimator)
        if self.solver == "random" and self.decay is not None:
            raise ValueError(
                f"expected no decay with solver='random', whose directions are not averaged, got {self.decay!r}; leave "
                "it out"
            )
        if self.solver == "differences" and self.decay is not None:
            raise ValueError(
                f"expected no decay with solver='differences', got {self.decay!r}: decay counts refreshes, of which "
                "there are none; its average forgets by step_decay a step"
            )
        dtype = self.basis_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in _BASIS_DTYPES):
            raise ValueError(
                "expected basis_dtype to be torch.bfloat16, float16, float32 or float64, or None for the parameters' "
                f"own (float32 at least), got {shown(dtype)}"
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # a plain number, whichever library it came from, as files can hold


_BASIS_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


_MOST = 1e6  # a factor on a step that float32 bears


def _is_number(value: object) -> TypeGuard[float]:
    return is_real(plain(value))


def check_factors(gamma: object, bulk_scale: object) -> None:
    """Raise a ValueError unless both are factors that a step can have."""
    for name, value in (("gamma", gamma), ("bulk_scale", bulk_scale)):
        if not _is_number(value) or not 0 <= value < math.inf:
            raise ValueError(
                f"expected {name} to be a finite number >= 0 (1 leaves the step as it is), got {shown(value)}"
            )
        if value > _MOST:
            raise ValueError(f"expected {name} of at most {_MOST:g}, more than which no step can bear, got {value}")
