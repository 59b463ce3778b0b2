"""Lightning modules around NSGD: a callback for any LightningModule, data, networks, and the `nsgd` command."""

from lightning_modules.averages import ReadOuts as ReadOuts
from lightning_modules.callbacks.refresh import RefreshDirections as RefreshDirections
from lightning_modules.classifier import Classifier as Classifier
from lightning_modules.data import Digits as Digits
from lightning_modules.data import HuggingFace as HuggingFace

__all__ = ["Classifier", "Digits", "HuggingFace", "ReadOuts", "RefreshDirections"]
