"""A LightningModule, made ready to be trained by a method in place of its own optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.model_helpers import is_overridden

from lightning_modules.study.methods.recipe import NSGDOptions, Recipe
from lightning_modules.study.methods.schedule import Schedule


def prepare(
    module: pl.LightningModule,
    recipe: Recipe,
    settings: Mapping[str, float],
    options: NSGDOptions,
    *,
    seed: int = 0,
    schedule: Schedule | None = None,
    steps: int = 0,
) -> None:
    """Have a LightningModule trained by a method, in place of its own optimizers, schedules and callbacks.

    Args:
        module: With automatic optimization.
        recipe: The method.
        settings: Its hyperparameters.
        options: Of the directions.
        seed: Of directions that are drawn at random.
        schedule: Of the learning rate, for methods that have none of their own; None for a constant one.
        steps: Of the run, which the schedule goes by.

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
    directions = recipe.directions(settings, options)
    hyperparameters = {name: settings[name] for name in recipe.defaults}
    configure = recipe.install(module, hyperparameters, None if directions is None else directions.damping(), seed)

    followed = recipe.followed(schedule)

    def configure_optimizers() -> Any:
        configured = configure()
        return configured if followed is None else followed.configured(configured, steps)

    module.configure_optimizers = configure_optimizers  # type: ignore[method-assign]
