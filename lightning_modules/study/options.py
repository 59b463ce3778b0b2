"""What a study is: its options, and what they resolve to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl

from lightning_modules.data.digits import Digits
from lightning_modules.study.methods import Method, NSGDOptions, Recipe, Schedule, Settings
from lightning_modules.study.methods.built_in import recipes_of
from lightning_modules.study.spectrum import Spectrum
from lightning_modules.support.import_paths import public_path
from lightning_modules.support.read_outs import average
from lightning_modules.support.score import Mode, Score, better

NAMED = Path(__file__).parent / "named"  # folder of the studies that nsgd compare knows by name

Ranges = dict[str, list[float]]  # lowest and highest value of a hyperparameter
Precision = Literal[  # as Lightning's Trainer takes them
    "32-true",
    "64-true",
    "bf16-mixed",
    "bf16-true",
    "16-mixed",
    "16-true",
    "transformer-engine",
    "transformer-engine-float16",
]


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
        endpoint: What the study is judged by, fixed before its runs: score, which is ``monitor``, in test where that is
            made; train_loss; or the name of the score in validation or in test. Everything else is secondary.
        net: Name of the network, or module:name of a function of your own from (channels, height, width) and the number
            of classes to a torch module; nsgd compare --help lists the names.
        sizes: Sizes that differ from the network's own, for example {widths: [16, 32], kernel_size: 3}.
        methods: Any of sgd, sgd-momentum, nsgd, nsgd-momentum, nsgd-hessian, bulk-sgd (gamma = 0), dom-sgd (gamma = 1,
            bulk_scale = 0), random (random directions), adamw, damped-adamw, sam, muon, soap, schedule-free, sgd-more
            and sgd-momentum-more (SGD given NSGD's extra gradients as steps), own (the module's configure_optimizers,
            with its schedule) and damped-own (the rule on it); and any optimizer as {class_path: torch.optim.RMSprop},
            with init_args, search (ranges of its trials), damped: true for the rule on it, and label, as far as
            wanted; and any variant of these as {like: nsgd, nsgd: {gamma: 0.01, k: 5}}, with settings, search ({} for
            no trials), clip (largest norm of the gradient), noise (standard deviation of white noise on it),
            batch_size (or all), epochs and schedule (in place of the data's and the study's) and label. The others are
            compared with the first.
        seeds: Number of paired seeds.
        epochs: Epochs of each run.
        lr: One learning rate for all methods but own and damped-own, in place of their own.
        weight_decay: One weight decay for all methods that have one, in place of their own; what it means, as part of
            the gradient or apart from it, is theirs.
        schedule: How the learning rate of all methods goes, for example {name: cosine, warmup: 0.05}, step by step
            over the whole of each run; null for constant. The optimizers of own and damped-own keep the module's, and
            those that average their weights themselves, such as schedule-free, take the warm-up alone.
        averages: Averages that the runs are read out with beside EMA, SWA and two points as they are, by name, for
            example [ema-0.9, swa-0.5, two-point-16]: a decay, a share of the steps at the end, steps between the
            points. Runs under the schedule that is predicted to equal one, as {like: sgd, schedule: {average:
            swa-0.5}, search: {}} makes them beside those of sgd, have none of them; the report compares the two.
        settings: Hyperparameters by method, for example {nsgd: {lr: 0.2, gamma: 0.3}}, in place of those of a study
            file; --settings.nsgd '{lr: 0.2}' changes those of one method.
        tune: Quasi-random trials of each method, each a run on the training split, of which the best three by val_loss
            (or ``monitor``, where none is logged) run again with two more seeds, and the mean of the three decides;
            0 for none.
        search: Ranges of the trials by method, for example {nsgd: {lr: [0.01, 1], gamma: [0.05, 0.5]}}, log-uniform.
        sweep: lr to draw final loss and score against the learning rate, over each method's range.
        sweep_points: Learning rates of a sweep.
        sweep_seeds: Seeds that each rate of a sweep is run with; the means are compared.
        target: Value of ``monitor`` whose cost is compared; null for the mean over seeds of the first method's best
            trial, and without trials for none.
        augment: Whether training data are augmented: sets the data's own option of that name; null leaves it to them.
        limit_test: Batches of the test data that are tested on, at most; null for all.
        threads: Threads of torch in each run. They change the numbers, so they belong to the study.
        accelerator: What runs train on, as Lightning's Trainer takes it (cpu, gpu, mps), one device each; auto for what
            it finds. The folder of a study goes on with the device that it began with alone.
        precision: Of the runs and their scores, as the Trainer takes it: 32-true, bf16-mixed, 16-mixed, 64-true, ...
        measure: What to measure along the first seed of each method, any of sharpness, valley, quadratic and
            averaging, or all; outside its seconds.
        measure_samples: Samples that are measured on, for all methods alike; null for as many as ``measure_overhead``
            pays in each run, of which few give larger curvatures. quadratic takes batches.
        measure_overhead: Gradients that each measurement may cost for each gradient of training.
        spectrum: Whether to measure, at the end of each run that counts and at its best validation, the Hessian's
            Frobenius norm, largest eigenvalue and the distance from the start, for example {k: 50, samples: 2560}; the
            weights of the best validation are read out as well. null for no.
        nsgd: Options of NSGD.
        data_config: Class path and options of the data as a file has them; null for those that they save as
            hyperparameters.
    """

    data: pl.LightningDataModule | None = field(default_factory=Digits)
    model: dict[str, Any] | None = None
    monitor: str | None = None
    mode: Mode | None = None
    endpoint: str = "score"
    net: str = "mlp"
    sizes: dict[str, Any] | None = None
    methods: list[str | dict[str, Any]] = field(default_factory=lambda: ["sgd", "nsgd", "bulk-sgd"])
    seeds: int = 5
    epochs: int = 40
    lr: float | None = None
    weight_decay: float | None = None
    schedule: Schedule | None = None
    averages: list[str] = field(default_factory=list)
    settings: dict[str, Settings] = field(default_factory=dict)
    tune: int = 0
    search: dict[str, Ranges] = field(default_factory=dict)
    sweep: Literal["lr"] | None = None
    sweep_points: int = 9
    sweep_seeds: int = 1
    target: float | None = None
    augment: bool | None = None
    limit_test: int | None = None
    threads: int = 1
    accelerator: str = "auto"
    precision: Precision = "32-true"
    measure: list[str] = field(default_factory=list)
    measure_samples: int | None = None
    measure_overhead: float = 0.15
    spectrum: Spectrum | None = None
    nsgd: NSGDOptions = field(default_factory=NSGDOptions)
    data_config: dict[str, Any] | None = None

    def resolved(self) -> dict[str, Any]:
        """Everything that the numbers depend on, as plain values; as a file it is a study of its own."""
        apart = {"data", "data_config", "schedule", "spectrum", "nsgd"} | (
            {"net", "sizes"} if self.model is not None else set()
        )
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        score = {"monitor": self.score.monitor, "mode": self.score.mode}
        schedule = None if self.schedule is None else self.schedule.resolved()
        spectrum = None if self.spectrum is None else asdict(self.spectrum)
        nested = {"schedule": schedule, "spectrum": spectrum, "nsgd": asdict(self.nsgd)}
        return {"data": self._data(), **plain, **score, **nested}

    @cached_property
    def recipes(self) -> dict[Method, Recipe]:
        """Everything there is of each method, by its name, in their order.

        Raises:
            ValueError: If a method is unknown, or cannot be made.
        """
        return recipes_of(self.methods)

    def described_methods(self) -> dict[str, dict[str, Any]]:
        """What a report needs to know of each method, as plain values; the schedule is that of its learning rate."""
        return {
            name: {
                **{key: getattr(recipe, key) for key in ("label", "color", "line", "control", "damps")},
                "damping": None if recipe.damping is None else dict(recipe.damping),
                "schedule": recipe.schedule_label(self.schedule),
                **self._predicted(recipe),
            }
            for name, recipe in self.recipes.items()
        }

    def _predicted(self, recipe: Recipe) -> dict[str, Any]:
        """The average that the last weights are predicted to be of a variant with nothing but its schedule changed."""
        schedule, like = recipe.schedule, recipe.like
        if schedule is None or schedule.average is None or like is None or like not in self.recipes:
            return {}
        other = self.recipes[like]
        falls = replace(other, schedule=schedule, label=recipe.label, color=recipe.color, line=recipe.line, like=like)
        same = replace(recipe, search=other.search, defaults=other.defaults) == falls
        if not same or replace(schedule, average=None) != (other.followed(self.schedule) or Schedule()):
            return {}
        return {"equals": {"method": like, "read_out": average(schedule.average).name}}

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
        name = self.recipes[method].tuned_as(method)
        defaults = self.recipes[name].defaults
        everywhere = {"lr": self.lr, "weight_decay": self.weight_decay}
        given = {n: value for n, value in everywhere.items() if value is not None and n in defaults}
        return {**defaults, **self.settings.get(name, {}), **given}

    def ranges(self, method: Method) -> Ranges:
        """Ranges of the hyperparameters that are searched, lowest and highest value; none where none are."""
        name = self.recipes[method].tuned_as(method)
        return self.search.get(name) or {n: list(ends) for n, ends in self.recipes[name].search.items()}
