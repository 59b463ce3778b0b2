"""What a module trains with by itself, as a method: its ``configure_optimizers``, with its schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.optim import Optimizer

from lightning_modules.study.methods.any_optimizer import with_rule
from lightning_modules.study.methods.recipe import Damping


def own(module: pl.LightningModule, settings: Mapping[str, float], damping: Damping, seed: int) -> Callable[[], Any]:
    """Leave a module its optimizer, with the rule on it where there are options of one.

    Raises:
        ValueError: If it has no ``configure_optimizers``; when that is called, if it gives more or less than one
            optimizer, or one that cannot be damped.
    """
    kind = type(module).__name__
    if not is_overridden("configure_optimizers", module):
        raise ValueError(
            f"expected {kind} to have a configure_optimizers, which the method own trains with, got none; give it one, "
            "or leave own and damped-own out of the methods"
        )
    configure = module.configure_optimizers

    def configure_optimizers() -> Any:
        configured = configure()
        optimizers = _optimizers(configured)
        if len(optimizers) != 1:
            raise ValueError(
                f"expected one optimizer from configure_optimizers of {kind}, got {len(optimizers)}; a study compares "
                "one with another, so leave own and damped-own out of the methods"
            )
        with_rule(optimizers[0], damping, seed)
        return configured

    return configure_optimizers


def _optimizers(configured: Any) -> list[Optimizer]:
    """Those in what ``configure_optimizers`` returned, in any of the forms that Lightning takes."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, Mapping):
        return _optimizers(configured["optimizer"])
    if isinstance(configured, list | tuple):
        pair = len(configured) == 2 and all(isinstance(part, list | tuple) for part in configured)
        return [optimizer for part in (configured[0] if pair else configured) for optimizer in _optimizers(part)]
    return []
