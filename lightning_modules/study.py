"""What a study is: its options, what they resolve to, and what is refused before anything runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from lightning_modules.callbacks import make_measurements
from lightning_modules.data import Digits, ImageData
from lightning_modules.methods import (
    METHODS,
    RECIPES,
    Method,
    NSGDOptions,
    Settings,
    hyperparameters,
    make_module,
    tuned_as,
)

Ranges = dict[str, list[float]]  # lowest and highest value of a hyperparameter


@dataclass(frozen=True)
class Study:
    """Train every method with every seed, and compare the weights and their averages.

    Args:
        data: Digits, or HuggingFace with ``--data.path``.
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
        tune: Quasi-random trials of each method, by validation loss after a run on the training split; 0 for none.
        search: Ranges of the trials by method, for example {nsgd: {lr: [0.01, 1], gamma: [0.05, 0.5]}}, log-uniform.
        sweep: lr to draw final loss and accuracy against the learning rate, over each method's range.
        sweep_points: Learning rates of a sweep.
        target: Validation accuracy whose cost is compared; null for that of the first method's best trial, and
            without trials for none.
        threads: Threads of torch in each run. They change the numbers, so they belong to the study.
        measure: What to measure along the first seed of each method, any of sharpness, valley, quadratic and
            averaging, or all; each for at most 15 gradients in 100 of training, outside its seconds.
        nsgd: Options of NSGD.
    """

    data: ImageData = field(default_factory=Digits)
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

    def resolved(self) -> dict[str, Any]:
        """Everything that the numbers depend on, as plain values; as a file it is a study of its own."""
        kind = type(self.data)
        # Of a class of the user's, hparams also hold the options of its base, which it need not take.
        taken = signature(kind).parameters
        every = any(p.kind is p.VAR_KEYWORD for p in taken.values())
        own = {n: str(v) if isinstance(v, Path) else v for n, v in self.data.hparams.items() if every or n in taken}
        data = {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": own}
        plain = {name: value for name, value in vars(self).items() if name not in ("data", "nsgd")}
        return {"data": data, **plain, "nsgd": asdict(self.nsgd)}

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
        if self.target is not None and not 0 < self.target < 1:
            raise ValueError(f"expected target to be an accuracy between 0 and 1, got {self.target}")
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
            module = make_module(method, {**self.given(method), **largest}, self.nsgd, self.network())
            module.configure_optimizers()
            if RECIPES[method].damping is not None:
                solver = "random" if method == "random" else self.nsgd.solver
                self.nsgd.callback().check_samples([solver], module.net)

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

    def network(self) -> dict[str, Any]:
        """What :func:`make_module` builds its network from."""
        shape, classes = self.data.input_shape, self.data.num_classes
        return {"net": self.net, "sizes": self.sizes, "input_shape": shape, "num_classes": classes}

    def given(self, method: Method) -> Settings:
        """Hyperparameters of a method as they are before any tuning."""
        name = tuned_as(method)
        everywhere = {} if self.lr is None else {"lr": self.lr}
        return {**RECIPES[name].defaults, **self.settings.get(name, {}), **everywhere}

    def ranges(self, method: Method) -> Ranges:
        """Ranges of the hyperparameters that are searched, lowest and highest value."""
        return self.search.get(method) or {name: list(ends) for name, ends in RECIPES[method].search.items()}

    @property
    def steps(self) -> int:
        """Optimizer steps of one run."""
        return self.epochs * len(self.data.train_dataloader())
