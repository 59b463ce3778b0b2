"""The options of the rule, and what is counted beside them: plain numbers, kept in parameter groups."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from nsgd.curvature.low_rank import Which

# Options that one optimizer has once; gamma, bulk_scale and curvature may differ from group to group.
SHARED = ("k", "refresh_every", "overhead", "decay", "which", "solver", "warmup_steps", "save_basis", "seed")

# How directions are estimated, or drawn; "auto" goes by what they come from.
Estimator = Literal["auto", "gradients", "lanczos", "arpack", "random"]

# Plain numbers kept in the first parameter group, so that any checkpoint carries them.
COUNTERS: dict[str, Any] = {
    "steps": 0,
    "refreshed_at": -1,  # value of steps at the last refresh
    "attempted_at": -1,  # and at the last attempt, also one that met a NaN
    "refreshes": 0,
    "skipped_refreshes": 0,
    "hvps": 0,
    "cost_gradients": 0.0,
    "spared_gradients": 0.0,  # by directions drawn in place of estimates
    "overlap": math.nan,
    "eigenvalues": [],
    "weights": [],
    "averaged": 0,  # estimates in the running average
    "trace": 0.0,  # of late
    "mean_square": math.nan,  # of the step outside the basis over lr, in the last steps
    "alarm": False,
}


def damping_options(
    *,
    k: int = 20,
    gamma: float = 0.1,
    refresh_every: int | Literal["auto"] = "auto",
    overhead: float = 0.1,
    decay: float | None = None,
    which: Which = "LA",
    bulk_scale: float = 1.0,
    solver: Estimator = "auto",
    warmup_steps: int = 0,
    save_basis: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """Validate the options of the rule and return them by name; :class:`nsgd.NSGD` describes them."""
    options = {
        "k": k,
        "gamma": gamma,
        "refresh_every": refresh_every,
        "overhead": overhead,
        "decay": decay,
        "which": which,
        "bulk_scale": bulk_scale,
        "solver": solver,
        "warmup_steps": warmup_steps,
        "save_basis": save_basis,
        "seed": seed,
        "curvature": True,
    }
    check_options(options)
    return options


def check_options(options: dict[str, Any]) -> None:
    """Raise a ValueError for the first option that is out of range."""
    for name, least in (("k", 1), ("refresh_every", 1), ("warmup_steps", 0), ("seed", 0)):
        value = options[name]
        if name == "refresh_every" and value == "auto":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            kind = "'auto' or a whole number" if name == "refresh_every" else "a whole number"
            raise ValueError(f"expected {name} to be {kind} of at least {least}, got {value!r}")
    for name in ("gamma", "bulk_scale"):
        value = options[name]
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError(f"expected {name} to be a finite number >= 0 (1 leaves the step as it is), got {value!r}")
    if not isinstance(options["overhead"], int | float) or not 0 < options["overhead"] < math.inf:
        raise ValueError(
            "expected overhead to be a number above 0, the gradients a step that refreshes may cost, got "
            f"{options['overhead']!r}"
        )
    decay = options["decay"]
    if decay is not None and not (isinstance(decay, int | float) and 0 <= decay < 1):
        raise ValueError(f"expected decay to be a number >= 0 and below 1, got {decay!r}; None is the default")
    for name, choices in (("which", get_args(Which)), ("solver", get_args(Estimator))):
        if options[name] not in choices:
            raise ValueError(f"expected {name} to be one of {', '.join(choices)}, got {options[name]!r}")
    if options["solver"] == "random" and decay is not None:
        raise ValueError(
            f"expected no decay with solver='random', whose directions are not averaged, got {decay!r}; leave it out"
        )
