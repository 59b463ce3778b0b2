"""What a study is: its options, what they resolve to, and what is refused before anything runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from jsonargparse import ArgumentParser
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.utils.data import DataLoader, IterableDataset

from lightning_modules.callbacks.measurements import make_measurements
from lightning_modules.data.digits import Digits
from lightning_modules.models.base import Split
from lightning_modules.models.classifier import Classifier
from lightning_modules.study.methods import (
    METHODS,
    RECIPES,
    Method,
    NSGDOptions,
    Settings,
    damping_of,
    hyperparameters,
    tuned_as,
)
from lightning_modules.study.optimizers import prepare, refresh_callbacks
from lightning_modules.study.runs.evaluate import logged_scores, wanted_scores
from lightning_modules.study.score import Mode, Score, better
from lightning_modules.support.import_paths import public_path

NAMED = Path(__file__).parent / "named"  # folder of the studies that nsgd compare knows by name

Ranges = dict[str, list[float]]  # lowest and highest value of a hyperparameter


@dataclass(frozen=True)
class Study:
    """Train every method with every seed, and compare the weights and their averages.

    Args:
        data: Digits, HuggingFace with ``--data.path``, Characters, or a LightningDataModule of your own; null where the
            module has data loaders of its own.
        model: LightningModule that is trained, as in nsgd fit; null for our Classifier with ``net`` and ``sizes``. Each
            method's optimizer takes the place of its own, of its schedules and of its callbacks.
        monitor: What is compared beside the training loss: the name that the module logs it under in validation, with
            "test" in place of "val" in its test; null for val_accuracy, or with a model of its own val_loss.
        mode: Whether less of it (min) or more (max) is better; null where its name tells, as loss, error, accuracy do.
        net: Name of the network, or module:name of a function of your own from (channels, height, width) and the number
            of classes to a torch module; nsgd compare --help lists the names.
        sizes: Sizes that differ from the network's own, for example {widths: [16, 32], kernel_size: 3}.
        methods: Any of sgd, sgd-momentum, nsgd, nsgd-momentum, bulk-sgd (gamma = 0), dom-sgd (gamma = 1,
            bulk_scale = 0), random (random directions), adamw, damped-adamw, sam, and sgd-more and
            sgd-momentum-more (SGD given NSGD's extra gradients as steps). The others are compared with the first.
        seeds: Number of paired seeds.
        epochs: Epochs of each run.
        lr: One learning rate for all methods, in place of their own.
        settings: Hyperparameters by method, for example {nsgd: {lr: 0.2, gamma: 0.3}}, in place of those of a study
            file; --settings.nsgd '{lr: 0.2}' changes those of one method.
        tune: Quasi-random trials of each method, by val_loss (or ``monitor``, where none is logged) after a run on the
            training split; 0 for none.
        search: Ranges of the trials by method, for example {nsgd: {lr: [0.01, 1], gamma: [0.05, 0.5]}}, log-uniform.
        sweep: lr to draw final loss and score against the learning rate, over each method's range.
        sweep_points: Learning rates of a sweep.
        target: Value of ``monitor`` whose cost is compared; null for that of the first method's best trial, and without
            trials for none.
        threads: Threads of torch in each run. They change the numbers, so they belong to the study.
        measure: What to measure along the first seed of each method, any of sharpness, valley, quadratic and
            averaging, or all; each for at most 15 gradients in 100 of training, outside its seconds.
        nsgd: Options of NSGD.
        data_config: Class path and options of the data as a file has them; null for those that they save as
            hyperparameters.
    """

    data: pl.LightningDataModule | None = field(default_factory=Digits)
    model: dict[str, Any] | None = None
    monitor: str | None = None
    mode: Mode | None = None
    net: str = "mlp"
    sizes: dict[str, Any] | None = None
    methods: list[Method] = field(default_factory=lambda: list[Method](("sgd", "nsgd", "bulk-sgd")))
    seeds: int = 5
    epochs: int = 40
    lr: float | None = None
    settings: dict[str, Settings] = field(default_factory=dict)
    tune: int = 0
    search: dict[str, Ranges] = field(default_factory=dict)
    sweep: Literal["lr"] | None = None
    sweep_points: int = 9
    target: float | None = None
    threads: int = 1
    measure: list[str] = field(default_factory=list)
    nsgd: NSGDOptions = field(default_factory=NSGDOptions)
    data_config: dict[str, Any] | None = None

    def resolved(self) -> dict[str, Any]:
        """Everything that the numbers depend on, as plain values; as a file it is a study of its own."""
        apart = {"data", "data_config", "nsgd"} | ({"net", "sizes"} if self.model is not None else set())
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        score = {"monitor": self.score.monitor, "mode": self.score.mode}
        return {"data": self._data(), **plain, **score, "nsgd": asdict(self.nsgd)}

    def _data(self) -> dict[str, Any] | None:
        if self.data is None or self.data_config is not None:
            return self.data_config
        kind = type(self.data)
        # Of a class of the user's, hparams also hold the options of its base, which it need not take.
        taken = signature(kind).parameters
        every = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        own = {n: str(v) if isinstance(v, Path) else v for n, v in self.data.hparams.items() if every or n in taken}
        return {"class_path": public_path(f"{kind.__module__}.{kind.__qualname__}"), "init_args": own}

    @property
    def score(self) -> Score:
        """What is compared beside the training loss."""
        monitor = self.monitor or ("val_accuracy" if self.model is None else "val_loss")
        return Score(monitor, self.mode or better(monitor))

    def check(self) -> None:
        """Raise a ValueError for what cannot run, before anything does."""
        least = {"seeds": 1, "epochs": 1, "threads": 1, "tune": 0, "sweep_points": 2}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"expected {name} of at least {bound}, got {getattr(self, name)}")
        if any(m not in METHODS for m in self.methods) or not self.methods:
            raise ValueError(f"expected methods to be among {', '.join(METHODS)}, got {self.methods}")
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"expected methods to be different, got {self.methods}")
        if self.sweep not in (None, "lr"):
            raise ValueError(f"expected sweep to be lr or null, got {self.sweep!r}")
        if self.lr is not None and not 0 <= self.lr < math.inf:
            raise ValueError(f"expected lr >= 0 and finite, got {self.lr}")
        if self.target is not None and self.model is None and self.score.is_share and not 0 < self.target < 1:
            raise ValueError(f"expected target to be an accuracy between 0 and 1, got {self.target}")
        if self.target is not None and not math.isfinite(self.target):
            raise ValueError(f"expected target to be finite, got {self.target}")
        if self.mode not in (None, "min", "max"):
            raise ValueError(f"expected mode to be min, max or null, got {self.mode!r}")
        if self.model is not None and self.sizes is not None:
            raise ValueError(f"expected no sizes with a model, whose options are its own, got {self.sizes}")
        if self.lr is not None and self.tune and any("lr" in self.ranges(tuned_as(m)) for m in self.methods):
            raise ValueError(
                f"expected no lr with tune, whose trials look for it, got {self.lr}; leave one of them out"
            )
        self._check_more()
        self._check_names("settings", self.settings)
        self._check_names("search", self.search)
        for method, values in self.settings.items():
            for name, value in values.items():
                if not 0 <= value < math.inf or (name == "momentum" and value >= 1):
                    wanted = "below 1" if name == "momentum" else "finite"
                    raise ValueError(f"expected settings.{method}.{name} >= 0 and {wanted}, got {value}")
        for method, ranges in self.search.items():
            for name, ends in ranges.items():
                if len(ends) != 2 or not 0 < ends[0] < ends[1] < math.inf:
                    raise ValueError(
                        f"expected search.{method}.{name} to be a lower and a higher number above 0, got {ends}"
                    )
                if name == "momentum" and ends[1] >= 1:
                    raise ValueError(f"expected search.{method}.momentum below 1, got {ends}")
        make_measurements(self.measure)
        for method in self.methods:
            largest = {name: ends[1] for name, ends in self.ranges(tuned_as(method)).items()} if self.tune else {}
            module = self.module()
            prepare(module, method, {**self.given(method), **largest}, self.nsgd)
            module.configure_model()
            if not is_overridden("setup", module):  # which may make layers, from the data
                module.configure_optimizers()
            if RECIPES[method].damping is not None:
                options = damping_of(method, self.given(method), self.nsgd) or self.nsgd
                for callback in refresh_callbacks(options):
                    callback.check_samples([options.solver], module)
        if self.steps < 1:
            raise ValueError("expected a batch of training data at least, got none")
        if self.model is not None or self.monitor is not None:
            self._check_scores()

    def _check_scores(self) -> None:
        """Validate, and test, on one batch: what is to be compared has to be logged there."""
        module, data = self.module(), self.fresh_data()
        kind = type(module).__name__
        if not is_overridden("validation_step", module) or self.loader_of("val") is None:
            raise ValueError(
                f"expected {kind} to have a validation_step, and its data a val_dataloader, got none; a study compares "
                "what is logged there"
            )
        stages: dict[Split, str] = {
            "val": self.score.monitor,
            **({"test": self.score.tested} if self.is_tested else {}),
        }
        for stage, name in stages.items():
            logged = logged_scores(module, data, stage, **{f"limit_{stage}_batches": 1})
            if name not in wanted_scores(logged, stage, self.score):
                mend = "name what it logs there with --monitor" if stage == "val" else "log it there as well"
                raise ValueError(
                    f"expected {kind} to log {name} in {'validation' if stage == 'val' else 'its test'}, got "
                    f"{', '.join(logged) or 'nothing'}; {mend}"
                )

    def _check_more(self) -> None:
        for method in self.methods:
            wanted = RECIPES[method].more_of or ()
            if missing := [m for m in wanted if m not in self.methods]:
                raise ValueError(
                    f"{method} takes its settings and its gradients from {' and '.join(wanted)}; "
                    f"expected them among the methods, got no {' and no '.join(missing)}"
                )

    def _check_names(self, option: str, values: Mapping[str, Iterable[str]]) -> None:
        for method, names in values.items():
            if method not in METHODS or RECIPES[method].more_of:
                own = [m for m in METHODS if not RECIPES[m].more_of]
                raise ValueError(f"expected {option} of a method among {', '.join(own)}, got {method!r}")
            own_names = hyperparameters(method)
            if unknown := [name for name in names if name not in own_names]:
                raise ValueError(
                    f"expected {option} of {method} to be among {', '.join(own_names)}, got {unknown[0]!r}"
                )

    def module(self) -> pl.LightningModule:
        """What is trained, anew from the global seed.

        Raises:
            ValueError: If it cannot be made.
        """
        if self.model is not None:
            return _made(self.model)
        if missing := [name for name in ("input_shape", "num_classes") if not hasattr(self.data, name)]:
            raise ValueError(
                f"expected data with {' and '.join(missing)} for the network {self.net}, got "
                f"{type(self.data).__name__}; give image data, or a --model"
            )
        shape, classes = self.data.input_shape, self.data.num_classes  # type: ignore[union-attr]
        return Classifier(self.net, shape, classes, sizes=self.sizes)

    def loader_of(self, stage: Split) -> Any:
        """The loader of a stage, of the data or of the module; None where there is none."""
        name = f"{stage}_dataloader"
        return getattr(self._source, name)() if is_overridden(name, self._source) else None

    @cached_property
    def _source(self) -> Any:
        """The data, or the module with loaders of its own, set up once to look at the loaders, which no run takes."""
        if (data := self.fresh_data()) is not None:
            return data
        module = self.module()
        module.prepare_data()
        for stage in ("fit", *(["test"] if is_overridden("test_dataloader", module) else [])):
            module.setup(stage)
        return module

    def fresh_data(self) -> pl.LightningDataModule | None:
        """The data as they are before any run, set up once for all stages; None where the module has its own.

        Each run has a copy, so that it finds generators and the like as the others do. And they are not set up again
        for its validation and test, where many split anew, at random, and mix what was trained on with what was not.
        """
        if self.data is None:
            return None
        data = copy.deepcopy(self.data)
        data.prepare_data()
        for stage in ("fit", "validate", *(["test"] if is_overridden("test_dataloader", data) else [])):
            data.setup(stage)
        vars(data).update(prepare_data=lambda: None, setup=lambda stage: None)
        return data

    @cached_property
    def is_tested(self) -> bool:
        """Whether there are test data, and a test of the module's."""
        return is_overridden("test_step", self.module()) and self.loader_of("test") is not None

    def given(self, method: Method) -> Settings:
        """Hyperparameters of a method as they are before any tuning."""
        name = tuned_as(method)
        everywhere = {} if self.lr is None else {"lr": self.lr}
        return {**RECIPES[name].defaults, **self.settings.get(name, {}), **everywhere}

    def ranges(self, method: Method) -> Ranges:
        """Ranges of the hyperparameters that are searched, lowest and highest value."""
        return self.search.get(method) or {name: list(ends) for name, ends in RECIPES[method].search.items()}

    @cached_property
    def steps(self) -> int:
        """Optimizer steps of one run.

        Raises:
            ValueError: If there is no training loader, or none with a length.
        """
        loader = self.loader_of("train")
        if loader is None:
            raise ValueError("expected data with a train_dataloader, got none; give --data, or the model one")
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            what = "an IterableDataset" if isinstance(loader, DataLoader) else f"a {type(loader).__name__}"
            raise ValueError(
                f"expected a train_dataloader that is a DataLoader over a data set with a length, got {what}: a study "
                "needs to know its steps beforehand, and takes the training loss of samples"
            )
        return self.epochs * len(loader)


def _made(config: Mapping[str, Any]) -> pl.LightningModule:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(pl.LightningModule, "model", required=True)
    found: pl.LightningModule = parser.instantiate_classes(parser.parse_object({"model": dict(config)})).model
    return found
