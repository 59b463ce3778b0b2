"""Lightning modules around NSGD: callbacks for any LightningModule, data, networks, and the `nsgd` command."""

from lightning_modules.averages import ReadOuts as ReadOuts
from lightning_modules.callbacks import AveragingExperiment as AveragingExperiment
from lightning_modules.callbacks import BatchQuadratic as BatchQuadratic
from lightning_modules.callbacks import SharpnessMonitor as SharpnessMonitor
from lightning_modules.callbacks import ValleyWalk as ValleyWalk
from lightning_modules.callbacks.refresh import RefreshDirections as RefreshDirections
from lightning_modules.classifier import Classifier as Classifier
from lightning_modules.data import Digits as Digits
from lightning_modules.data import HuggingFace as HuggingFace
from lightning_modules.language import Characters as Characters
from lightning_modules.language import LanguageModel as LanguageModel
from lightning_modules.sharpness_aware import SharpnessAware as SharpnessAware

__all__ = [
    "AveragingExperiment",
    "BatchQuadratic",
    "Characters",
    "Classifier",
    "Digits",
    "HuggingFace",
    "LanguageModel",
    "ReadOuts",
    "RefreshDirections",
    "SharpnessAware",
    "SharpnessMonitor",
    "ValleyWalk",
]
