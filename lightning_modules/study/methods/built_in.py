"""The methods that a study knows by name. To add one is to add an entry here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_modules.models.sharpness_aware import sharpness_aware
from lightning_modules.study.methods.any_optimizer import entry_recipe, with_rule
from lightning_modules.study.methods.muon import Muon
from lightning_modules.study.methods.own import own
from lightning_modules.study.methods.recipe import Damping, Install, Method, Recipe, made_by
from lightning_modules.study.methods.variant import variant_recipe
from lightning_modules.support.nearest import meant
from nsgd import NSGD

Ranges = Mapping[str, tuple[float, float]]
Params = Iterable[torch.nn.Parameter]


def _sgd(params: Params, settings: Mapping[str, float], damping: Damping, seed: int) -> torch.optim.Optimizer:
    options: dict[str, Any] = dict(settings)
    return torch.optim.SGD(params, **options) if damping is None else NSGD(params, **options, seed=seed, **damping)


def _made(make: Callable[..., torch.optim.Optimizer]) -> Install:
    """By a class, or by a function of parameters and settings, with the rule on it where that is asked for."""

    def optimizer(params: Params, settings: Mapping[str, float], damping: Damping, seed: int) -> torch.optim.Optimizer:
        return with_rule(make(params, **settings), damping, seed)

    return made_by(optimizer)


def _from_pytorch_optimizer(name: str) -> Install:
    def make(params: Params, **settings: float) -> torch.optim.Optimizer:
        import pytorch_optimizer  # here, since it brings a hundred optimizers and takes 0.4 s to import

        found: torch.optim.Optimizer = getattr(pytorch_optimizer, name)(params, **settings)
        return found

    return _made(make)


def _sam(
    module: pl.LightningModule, settings: Mapping[str, float], damping: Damping, seed: int
) -> Callable[[], torch.optim.Optimizer]:
    """Two passes a step, which is more than an optimizer can do."""
    sharpness_aware(module, **settings)
    found: Callable[[], torch.optim.Optimizer] = module.configure_optimizers  # type: ignore[assignment]
    return found


_SGD_RATES: Ranges = {"lr": (0.01, 4.0)}
_ADAM_RATES: Ranges = {"lr": (1e-4, 1e-2)}
_ADAM = {"lr": 1e-3, "weight_decay": 0.01}


def _of_sgds_kind(label: str, color: str, line: str, *, momentum: float = 0.0, **rest: Any) -> Recipe:
    defaults = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.0}
    return Recipe(label, made_by(_sgd), color, line, defaults, _SGD_RATES, **rest)


# Colors are those of Okabe and Ito. No two methods share color and line, and curves that coincide stay visible.
RECIPES: dict[Method, Recipe] = {
    "sgd": _of_sgds_kind("SGD", "#444444", "-"),
    "sgd-momentum": _of_sgds_kind("SGD with momentum", "#444444", "--", momentum=0.9),
    "nsgd": _of_sgds_kind("NSGD", "#0072b2", "-", damping={}),
    "nsgd-momentum": _of_sgds_kind("NSGD with momentum", "#0072b2", "--", momentum=0.9, damping={}),
    "bulk-sgd": _of_sgds_kind("Bulk-SGD", "#d55e00", "--", damping={"gamma": 0.0, "bulk_scale": 1.0}),
    "dom-sgd": _of_sgds_kind("Dom-SGD", "#009e73", "-.", damping={"gamma": 1.0, "bulk_scale": 0.0}, control=True),
    # The 2019 paper's own directions.
    "nsgd-hessian": _of_sgds_kind(
        "NSGD by Hessian eigenvectors", "#0072b2", "-.", damping={"solver": "lanczos", "decay": None}
    ),
    # The 2019 paper's own control: as many directions as NSGD's, that the curvature has no part in.
    "random": _of_sgds_kind(
        "random directions", "#999999", ":", damping={"solver": "random", "decay": None}, control=True
    ),
    "sgd-more": _of_sgds_kind("SGD given NSGD's gradients", "#cc79a7", "-", more_of=("sgd", "nsgd"), control=True),
    "sgd-momentum-more": _of_sgds_kind(
        "momentum SGD given NSGD's gradients",
        "#cc79a7",
        "--",
        momentum=0.9,
        more_of=("sgd-momentum", "nsgd-momentum"),
        control=True,
    ),
    "adamw": Recipe("AdamW", _made(torch.optim.AdamW), "#009e73", "-", _ADAM, _ADAM_RATES),
    "damped-adamw": Recipe("damped AdamW", _made(torch.optim.AdamW), "#56b4e9", "-", _ADAM, _ADAM_RATES, damping={}),
    "sam": Recipe(
        "SAM", _sam, "#e69f00", "-", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "rho": 0.05}, _SGD_RATES
    ),
    "muon": Recipe("Muon", _made(Muon), "#d55e00", "-", {"lr": 5e-3, "weight_decay": 0.01}, {"lr": (5e-4, 5e-2)}),
    "soap": Recipe(
        "SOAP",
        _from_pytorch_optimizer("SOAP"),
        "#e69f00",
        "--",
        {"lr": 3e-3, "weight_decay": 0.01},
        {"lr": (3e-4, 3e-2)},
    ),
    "schedule-free": Recipe(
        "schedule-free AdamW",
        _from_pytorch_optimizer("ScheduleFreeAdamW"),
        "#009e73",
        "--",
        {"lr": 2.5e-3, "weight_decay": 0.01},
        {"lr": (2.5e-4, 2.5e-2)},
        follows="warm-up",
    ),
    # What the module is trained with without any study.
    "own": Recipe("the module's own optimizer", own, "#444444", ":", follows="nothing"),
    "damped-own": Recipe("the module's own optimizer, damped", own, "#56b4e9", "--", damping={}, follows="nothing"),
}

_COLORS = ("#cc79a7", "#e69f00", "#d55e00", "#56b4e9", "#009e73", "#0072b2", "#444444")


def recipes_of(methods: Sequence[str | Mapping[str, Any]]) -> dict[Method, Recipe]:
    """The recipes of a study's methods by their names, in their order.

    Args:
        methods: Names of built-in ones, variants of these as :func:`variant_recipe` takes them, and optimizers as
            :func:`entry_recipe` does.

    Raises:
        ValueError: If there is none, one is unknown or cannot be made, or two have one name.
    """
    if not methods:
        raise ValueError(f"expected methods, among {', '.join(RECIPES)}, got none; name one at least")
    taken = {(recipe.color, recipe.line) for recipe in RECIPES.values()}
    styles = (style for style in product(("-.", ":", "--", "-"), _COLORS) if style[::-1] not in taken)
    found: dict[Method, Recipe] = {}
    for method in methods:
        if isinstance(method, str):
            if method not in RECIPES:
                raise ValueError(
                    f"expected methods to be among {', '.join(RECIPES)}, or any optimizer as {{class_path: "
                    f"torch.optim.RMSprop}}, got {method!r}{meant(method, RECIPES)}"
                )
            name, recipe = method, RECIPES[method]
        else:
            line, color = next(styles, ("-", "#999999"))
            if "like" in method:
                name, recipe = variant_recipe(method, color=color, line=line, built_in=RECIPES, taken=RECIPES)
            else:
                name, recipe = entry_recipe(method, color=color, line=line, taken=RECIPES)
        if name in found:
            mend = "" if isinstance(method, str) else "; give one of them a label"
            raise ValueError(f"expected methods to be different, got {name} twice{mend}")
        found[name] = recipe
    return found
