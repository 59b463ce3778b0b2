"""What a study trains and judges: its module, its data and their loaders, anew for every run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import pytorch_lightning as pl
from jsonargparse import ArgumentParser
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, IterableDataset

from lightning_modules.data.images import ImageData
from lightning_modules.models.base import Split
from lightning_modules.models.classifier import Classifier
from lightning_modules.study.methods.recipe import BatchSize, Method
from lightning_modules.study.options import Study
from lightning_modules.study.runs.devices import Devices, find_devices
from lightning_modules.support.quiet import quiet, quiet_trainer


class Subject:
    """The module and the data that the options of a study mean.

    Args:
        study: The options.
    """

    def __init__(self, study: Study) -> None:
        self.study = study

    @property
    def endpoint(self) -> str:
        """Column of results.csv that the study is judged by, in its last weights."""
        return self.main_score if self.study.endpoint == "score" else self.study.endpoint

    @property
    def main_score(self) -> str:
        """Column of the score: in test where there is one, else in validation."""
        return self.study.score.tested if self.is_tested else self.study.score.monitor

    def resolved(self) -> dict[str, Any]:
        """The study's options as plain values, with the column of its endpoint; as a file it is a study of its own."""
        return {**self.study.resolved(), "endpoint": self.endpoint}

    @cached_property
    def devices(self) -> Devices:
        """What runs train on.

        Raises:
            ValueError: If this machine does not have it.
        """
        return find_devices(self.study.accelerator, self.study.precision)

    def trainer(self, **options: Any) -> pl.Trainer:
        """A trainer of the study's, on one device, that writes nothing."""
        accelerator, precision = self.devices.accelerator, self.study.precision
        with quiet():
            return quiet_trainer(**options, accelerator=accelerator, devices=1, precision=precision)

    def module(self) -> pl.LightningModule:
        """What is trained, anew from the global seed.

        Raises:
            ValueError: If it cannot be made.
        """
        study = self.study
        if study.model is not None:
            return _module_of(study.model)
        if missing := [name for name in ("input_shape", "num_classes") if not hasattr(study.data, name)]:
            raise ValueError(
                f"expected data with {' and '.join(missing)} for the network {study.net}, got "
                f"{type(study.data).__name__}; give image data, or a --model"
            )
        shape, classes = study.data.input_shape, study.data.num_classes  # type: ignore[union-attr]
        return Classifier(study.net, shape, classes, sizes=study.sizes)

    def data(self, method: Method | None = None) -> pl.LightningDataModule | None:
        """The data as they are before any run, set up once for all stages; None where the module has its own.

        Each run has a copy, so that it finds generators and the like as the others do. And they are not set up again
        for its validation and test, where many split anew, at random, and mix what was trained on with what was not.

        Args:
            method: Whose batches they are to make, where it has a batch size of its own.
        """
        if self.study.data is None:
            return None
        data = copy.deepcopy(self.study.data)
        if self.study.augment is not None:
            vars(data).update(augment=self.study.augment)
        data.prepare_data()
        for stage in ("fit", "validate", *(["test"] if is_overridden("test_dataloader", data) else [])):
            data.setup(stage)
        size = None if method is None else self.study.recipes[method].batch_size
        if size is not None:
            _set_batches(data, self._training_samples if size == "all" else size)
        vars(data).update(prepare_data=lambda: None, setup=lambda stage: None)
        return data

    @property
    def goes_on(self) -> bool:
        """Whether an interrupted run may go on from the end of an epoch: ours; what others keep is not known."""
        return self.study.model is None and isinstance(self.study.data, ImageData)

    def loader(self, stage: Split, method: Method | None = None) -> Any:
        """The loader of a stage, of the data or of the module; None where there is none.

        Args:
            stage: "train", "val" or "test".
            method: Whose it is, where it may have a batch size of its own.
        """
        name = f"{stage}_dataloader"
        own = method is not None and self.study.recipes[method].batch_size is not None
        source = self.data(method) if own else self._source
        return getattr(source, name)() if is_overridden(name, source) else None

    @cached_property
    def _source(self) -> Any:
        """The data, or the module with loaders of its own, set up once to look at the loaders, which no run takes."""
        if (data := self.data()) is not None:
            return data
        module = self.module()
        module.prepare_data()
        for stage in ("fit", *(["test"] if is_overridden("test_dataloader", module) else [])):
            module.setup(stage)
        return module

    @cached_property
    def is_tested(self) -> bool:
        """Whether there are test data, and a test of the module's."""
        return is_overridden("test_step", self.module()) and self.loader("test") is not None

    def steps(self, method: Method) -> int:
        """Optimizer steps of a run of a method.

        Raises:
            ValueError: If there is no training loader, or none with a length.
        """
        recipe = self.study.recipes[method]
        if recipe.batch_size not in self._batches:
            self._batches[recipe.batch_size] = self._batches_of(method)
        return (recipe.epochs or self.study.epochs) * self._batches[recipe.batch_size]

    @cached_property
    def _batches(self) -> dict[BatchSize | None, int]:
        """Batches of an epoch, by the batch size that a method has of its own."""
        return {}

    def _batches_of(self, method: Method) -> int:
        """Batches of an epoch of a method.

        Raises:
            ValueError: If its batches are not of the size that it asks for.
        """
        size = self.study.recipes[method].batch_size
        if size is None:
            return len(self._training_loader)
        count, size = len(self.loader("train", method)), self._training_samples if size == "all" else size
        if count not in (self._training_samples // size, -(-self._training_samples // size)):
            raise ValueError(
                f"expected data whose train_dataloader goes by their batch_size, got {count} batches of {size} from "
                f"{self._training_samples} samples; leave batch_size out of {self.study.recipes[method].label}"
            )
        return count

    @property
    def _training_samples(self) -> int:
        return len(self._training_loader.dataset)  # type: ignore[arg-type]

    @cached_property
    def _training_loader(self) -> DataLoader[Any]:
        """The loader of the training data, as they make it.

        Raises:
            ValueError: If there is none, or none with a length.
        """
        loader = self.loader("train")
        if loader is None:
            raise ValueError("expected data with a train_dataloader, got none; give --data, or the model one")
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            what = "an IterableDataset" if isinstance(loader, DataLoader) else f"a {type(loader).__name__}"
            raise ValueError(
                f"expected a train_dataloader that is a DataLoader over a data set with a length, got {what}: a study "
                "needs to know its steps beforehand, and takes the training loss of samples"
            )
        return loader


def _set_batches(data: pl.LightningDataModule, size: int) -> None:
    """Have data make training batches of a size; those of validation and test stay as they are."""
    make, usual = data.train_dataloader, data.batch_size  # type: ignore[attr-defined]

    def train_dataloader() -> Any:
        vars(data).update(batch_size=size)
        try:
            return make()
        finally:
            vars(data).update(batch_size=usual)

    vars(data).update(train_dataloader=train_dataloader)


def _module_of(config: Mapping[str, Any]) -> pl.LightningModule:
    """The module that a class path and its options name."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningModule, "model", required=True)
    module: pl.LightningModule = parser.instantiate_classes(parser.parse_object({"model": dict(config)})).model
    return module
