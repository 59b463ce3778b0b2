"""Lightning modules around NSGD: callbacks for any LightningModule, data, networks, and the `nsgd` command."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules.averages import ReadOuts as ReadOuts
    from lightning_modules.callbacks import AveragingExperiment as AveragingExperiment
    from lightning_modules.callbacks import BatchQuadratic as BatchQuadratic
    from lightning_modules.callbacks import SharpnessMonitor as SharpnessMonitor
    from lightning_modules.callbacks import ValleyWalk as ValleyWalk
    from lightning_modules.callbacks.refresh import RefreshDirections as RefreshDirections
    from lightning_modules.callbacks.write_averages import WriteAverages as WriteAverages
    from lightning_modules.classifier import Classifier as Classifier
    from lightning_modules.data import Digits as Digits
    from lightning_modules.data import HuggingFace as HuggingFace
    from lightning_modules.language import Characters as Characters
    from lightning_modules.language import LanguageModel as LanguageModel
    from lightning_modules.sharpness_aware import SharpnessAware as SharpnessAware

_HOMES = {
    "averages": ("ReadOuts",),
    "callbacks": ("AveragingExperiment", "BatchQuadratic", "SharpnessMonitor", "ValleyWalk"),
    "callbacks.refresh": ("RefreshDirections",),
    "callbacks.write_averages": ("WriteAverages",),
    "classifier": ("Classifier",),
    "data": ("Digits", "HuggingFace"),
    "language": ("Characters", "LanguageModel"),
    "sharpness_aware": ("SharpnessAware",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import what is asked for, and not before: Lightning takes seconds, which ``nsgd --help`` does without."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
