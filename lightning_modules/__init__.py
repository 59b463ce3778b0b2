"""Lightning modules around NSGD: callbacks for any LightningModule, data, networks, and the `nsgd` command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_modules.support.import_paths import HOMES, public

if TYPE_CHECKING:
    from lightning_modules.callbacks.averages import ReadOuts as ReadOuts
    from lightning_modules.callbacks.measurements.averaging import AveragingExperiment as AveragingExperiment
    from lightning_modules.callbacks.measurements.measurement import Measurement as Measurement
    from lightning_modules.callbacks.measurements.quadratic import BatchQuadratic as BatchQuadratic
    from lightning_modules.callbacks.measurements.sharpness import SharpnessMonitor as SharpnessMonitor
    from lightning_modules.callbacks.measurements.valley import ValleyWalk as ValleyWalk
    from lightning_modules.callbacks.refresh import RefreshDirections as RefreshDirections
    from lightning_modules.callbacks.write_averages import WriteAverages as WriteAverages
    from lightning_modules.data.characters import Characters as Characters
    from lightning_modules.data.digits import Digits as Digits
    from lightning_modules.data.hugging_face import HuggingFace as HuggingFace
    from lightning_modules.data.images import ImageData as ImageData
    from lightning_modules.data.images import Images as Images
    from lightning_modules.models.classifier import Classifier as Classifier
    from lightning_modules.models.language import LanguageModel as LanguageModel
    from lightning_modules.models.sharpness_aware import SharpnessAware as SharpnessAware

__all__ = sorted(HOMES)


def __getattr__(name: str) -> Any:
    """Import what is asked for, and not before: Lightning takes seconds, which ``nsgd --help`` does without."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return public(name)
