"""How a module is trained by a method of a study: its optimizer, and the callback that refreshes its directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.model_helpers import is_overridden

from lightning_modules.callbacks.refresh import RefreshDirections
from lightning_modules.models.sharpness_aware import sharpness_aware
from lightning_modules.study.methods import RECIPES, Method, NSGDOptions, damping_of
from nsgd import NSGD, damp
from nsgd.options import FROM_TRAINING


def refresh_callbacks(options: NSGDOptions) -> list[RefreshDirections]:
    """The callback that refreshes with these options; none where training's own gradients do."""
    callback = RefreshDirections(samples=options.samples, group_size=options.group_size, source=options.source)
    return [] if options.solver in FROM_TRAINING else [callback]


def make_optimizer(
    method: Method,
    settings: Mapping[str, float],
    options: NSGDOptions,
    params: Iterable[torch.nn.Parameter],
    *,
    seed: int = 0,
) -> torch.optim.Optimizer:
    """The optimizer of a method that trains by automatic optimisation.

    Args:
        method: Its name.
        settings: Its hyperparameters, all of :func:`lightning_modules.study.methods.hyperparameters` but gamma and k,
            which ``options`` hold too.
        options: Of the directions.
        params: What it trains.
        seed: Of directions that are drawn at random.

    Raises:
        ValueError: If an option is out of range.
    """
    own: dict[str, Any] = {name: settings[name] for name in RECIPES[method].defaults}
    directions = damping_of(method, settings, options)
    if method in ("adamw", "damped-adamw"):
        adamw = torch.optim.AdamW(params, **own)
        return adamw if directions is None else damp(adamw, seed=seed, **directions.damping())
    if directions is None:
        return torch.optim.SGD(params, **own)
    return NSGD(params, **own, seed=seed, **directions.damping())


def prepare(
    module: pl.LightningModule, method: Method, settings: Mapping[str, float], options: NSGDOptions, *, seed: int = 0
) -> None:
    """Have a LightningModule trained by a method, in place of its own optimizers, schedules and callbacks.

    Args:
        module: With automatic optimization.
        method: Its name.
        settings: Its hyperparameters.
        options: Of the directions.
        seed: Of directions that are drawn at random.

    Raises:
        ValueError: If an option is out of range, or the module takes its own optimizer steps, or changes those of its
            optimizer, for the methods would not be comparable.
    """
    if is_overridden("optimizer_step", module):
        raise ValueError(
            f"expected a module whose optimizer steps are plain, got {type(module).__name__}, which overrides "
            "optimizer_step; a study compares what optimizers do, so leave it out"
        )
    if not module.automatic_optimization:
        raise ValueError(
            f"expected a module with automatic optimization, whose optimizer a study can choose, got "
            f"{type(module).__name__}, which takes its own optimizer steps"
        )
    module.configure_callbacks = lambda: []  # type: ignore[method-assign]  # such as one that stops early
    if method == "sam":
        sharpness_aware(module, **{name: settings[name] for name in RECIPES[method].defaults})
        return

    def configure_optimizers() -> torch.optim.Optimizer:
        return make_optimizer(method, settings, options, module.parameters(), seed=seed)

    module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]
