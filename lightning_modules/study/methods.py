"""The methods that a study compares: what each is called, what is tuned of it, and its options. Free of Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from nsgd.curvature.low_rank import Which
from nsgd.options import Estimator

Method = Literal[
    "sgd",
    "sgd-momentum",
    "nsgd",
    "nsgd-momentum",
    "bulk-sgd",
    "dom-sgd",
    "nsgd-hessian",
    "random",
    "sgd-more",
    "sgd-momentum-more",
    "adamw",
    "damped-adamw",
    "sam",
]
METHODS: tuple[Method, ...] = get_args(Method)
Settings = dict[str, float]  # hyperparameters of a method by name


@dataclass(frozen=True)
class NSGDOptions:
    """Options of NSGD and of its refreshes; the methods other than nsgd set gamma and bulk_scale themselves.

    Args:
        k: Number of directions.
        gamma: Factor on the step along them.
        refresh_every: Steps between two refreshes, or "auto" for as many as ``overhead`` pays; a study settles the
            number once for each method, before the runs, and keeps it in its folder.
        overhead: With "auto", what refreshes may cost, as a share of the seconds of the steps between them; for random
            directions, in gradients a step.
        decay: Share of the last directions in their running average; null for 0.95 with gradients, else 0.
        samples: Samples that the directions come from; null for the whole batch.
        group_size: Samples in a group, whose gradients give the directions; null for 1, or 8 with BatchNorm.
        source: "batch" for a slice of the running batch, "train" for a fresh sample of the training set.
        which: "LA", "LM" or "SA".
        bulk_scale: Factor on the step outside the directions.
        solver: "auto" or "differences" takes the directions from the gradients that training leaves; "gradients" from
            those of groups of samples, "lanczos" or "arpack" from Hessian-vector products, "random" draws them.
        warmup_steps: Steps before the first refresh.
    """

    k: int = 20
    gamma: float = 0.1
    refresh_every: int | Literal["auto"] = "auto"
    overhead: float = 0.1
    decay: float | None = None
    samples: int | None = 32
    group_size: int | None = None
    source: Literal["batch", "train"] = "batch"
    which: Which = "LA"
    bulk_scale: float = 1.0
    solver: Estimator = "auto"
    warmup_steps: int = 0

    def damping(self) -> dict[str, Any]:
        """The options that the optimizer takes."""
        names = ("k", "gamma", "refresh_every", "overhead", "decay", "which", "bulk_scale", "solver", "warmup_steps")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Recipe:
    """What there is to know of a method before it runs."""

    label: str
    defaults: Settings
    search: dict[str, tuple[float, float]]  # ranges of a quasi-random search, log-uniform
    damping: Mapping[str, Any] | None = None  # options that it sets of NSGD's, where it has directions
    more_of: tuple[Method, Method] | None = None  # whose settings it takes, and whose gradients in the end


_SGD_RATES: dict[str, tuple[float, float]] = {"lr": (0.01, 1.0)}
_ADAM_RATES: dict[str, tuple[float, float]] = {"lr": (1e-4, 1e-2)}


def _sgd(
    label: str, momentum: float = 0.0, search: Mapping[str, tuple[float, float]] = _SGD_RATES, **rest: Any
) -> Recipe:
    return Recipe(label, {"lr": 0.1, "momentum": momentum, "weight_decay": 0.0}, dict(search), **rest)


RECIPES: dict[Method, Recipe] = {
    "sgd": _sgd("SGD"),
    "sgd-momentum": _sgd("SGD with momentum", 0.9),
    "nsgd": _sgd("NSGD", damping={}),
    "nsgd-momentum": _sgd("NSGD with momentum", 0.9, damping={}),
    "bulk-sgd": _sgd("Bulk-SGD", damping={"gamma": 0.0, "bulk_scale": 1.0}),
    "dom-sgd": _sgd("Dom-SGD", damping={"gamma": 1.0, "bulk_scale": 0.0}),
    # The 2019 paper's own directions.
    "nsgd-hessian": _sgd("NSGD by Hessian eigenvectors", damping={"solver": "lanczos", "decay": None}),
    # The 2019 paper's own control: as many directions as NSGD's, that the curvature has no part in.
    "random": _sgd("random directions", damping={"solver": "random", "decay": None}),
    "sgd-more": _sgd("SGD given NSGD's gradients", more_of=("sgd", "nsgd")),
    "sgd-momentum-more": _sgd("momentum SGD given NSGD's gradients", 0.9, more_of=("sgd-momentum", "nsgd-momentum")),
    "adamw": Recipe("AdamW", {"lr": 1e-3, "weight_decay": 0.01}, _ADAM_RATES),
    "damped-adamw": Recipe("damped AdamW", {"lr": 1e-3, "weight_decay": 0.01}, _ADAM_RATES, damping={}),
    "sam": Recipe("SAM", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "rho": 0.05}, dict(_SGD_RATES)),
}


def tuned_as(method: Method) -> Method:
    """The method whose settings a method takes: itself, but where it is another's with more steps."""
    more_of = RECIPES[method].more_of
    return method if more_of is None else more_of[0]


def hyperparameters(method: Method) -> tuple[str, ...]:
    """Names of the settings of a method."""
    recipe = RECIPES[method]
    own = () if recipe.damping is None else tuple(n for n in ("gamma", "k") if n not in recipe.damping)
    return (*recipe.defaults, *own)


def damping_of(method: Method, settings: Mapping[str, float], options: NSGDOptions) -> NSGDOptions | None:
    """Options of the directions of a method, or None where it has none."""
    recipe = RECIPES[method]
    if recipe.damping is None:
        return None
    own: dict[str, Any] = {name: settings[name] for name in ("gamma", "k") if name in settings}
    if "k" in own:
        own["k"] = round(own["k"])
    return replace(options, **{**own, **recipe.damping})
