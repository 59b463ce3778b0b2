"""What a study is: its options, and what they resolve to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl

from lightning_modules.data.digits import Digits
from lightning_modules.study.methods import RECIPES, Method, NSGDOptions, Settings, tuned_as
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

    def given(self, method: Method) -> Settings:
        """Hyperparameters of a method as they are before any tuning."""
        name = tuned_as(method)
        everywhere = {} if self.lr is None else {"lr": self.lr}
        return {**RECIPES[name].defaults, **self.settings.get(name, {}), **everywhere}

    def ranges(self, method: Method) -> Ranges:
        """Ranges of the hyperparameters that are searched, lowest and highest value."""
        return self.search.get(method) or {name: list(ends) for name, ends in RECIPES[method].search.items()}
