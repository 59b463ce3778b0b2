"""What there is to know of a method before it runs, in one place for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import pytorch_lightning as pl
import torch

from lightning_modules.callbacks.refresh import RefreshDirections
from lightning_modules.study.methods.schedule import Schedule
from nsgd.curvature.low_rank import Which
from nsgd.options import FROM_TRAINING, Estimator

Method = str  # the name of a method in its study
Settings = dict[str, float]  # hyperparameters of a method by name
BatchSize = int | Literal["all"]
Damping = Mapping[str, Any] | None  # options that the rule takes, where there is any
Make = Callable[[Iterable[torch.nn.Parameter], Mapping[str, float], Damping, int], torch.optim.Optimizer]
Install = Callable[[pl.LightningModule, Mapping[str, float], Damping, int], Callable[[], Any]]


@dataclass(frozen=True)
class NSGDOptions:
    """Options of NSGD and of its refreshes; the methods other than nsgd set gamma and bulk_scale themselves.

    Args:
        k: Number of directions.
        gamma: Factor on the step along them.
        refresh_every: Steps between two refreshes, or "auto" for as many as ``overhead`` pays; a study settles the
            number once for each method, before the runs, and keeps it in its folder.
        overhead: With "auto", what refreshes may cost, as a share of the seconds of the steps between them; for random
            directions, in gradients a step.
        decay: Share of the last directions in their running average, a refresh; null for 0.95 with gradients, else 0.
        step_decay: What an older difference of training gradients weighs in their running average, a step.
        samples: Samples that the directions come from; null for the whole batch.
        group_size: Samples in a group, whose gradients give the directions; null for 1, or 8 with BatchNorm.
        source: "batch" for a slice of the running batch, "train" for a fresh sample of the training set.
        which: "LA", "LM" or "SA".
        bulk_scale: Factor on the step outside the directions.
        solver: "auto" or "differences" takes the directions from the gradients that training leaves; "gradients" from
            those of groups of samples, "lanczos" or "arpack" from Hessian-vector products, "random" draws them.
        warmup_steps: Steps before the first refresh.
    """

    k: int = 20
    gamma: float = 0.1
    refresh_every: int | Literal["auto"] = "auto"
    overhead: float = 0.1
    decay: float | None = None
    step_decay: float = 0.98
    samples: int | None = 32
    group_size: int | None = None
    source: Literal["batch", "train"] = "batch"
    which: Which = "LA"
    bulk_scale: float = 1.0
    solver: Estimator = "auto"
    warmup_steps: int = 0

    def refresh(self) -> list[RefreshDirections]:
        """The callback that refreshes with these options; none where training's own gradients do."""
        callback = RefreshDirections(samples=self.samples, group_size=self.group_size, source=self.source)
        return [] if self.solver in FROM_TRAINING else [callback]

    def damping(self) -> dict[str, Any]:
        """The options that the optimizer takes."""
        of_refreshes = ("samples", "group_size", "source")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in of_refreshes}


@dataclass(frozen=True)
class Recipe:
    """Everything there is of a method.

    Attributes:
        label: What it is called in print.
        install: Has a module trained by the method, with settings, options of the rule and a seed; returns what takes
            the place of its ``configure_optimizers``. :func:`made_by` gives it for what is an optimizer alone.
        color: Of its curves.
        line: Matplotlib's line style of its curves; no two methods share color and line.
        defaults: Its hyperparameters, as they are before any tuning.
        search: Ranges of a quasi-random search, log-uniform; a method without any is not tuned.
        damping: Options that it sets of NSGD's, where it has directions; none are left to the study with ``{}``.
        control: Whether it stands for what something other than the curvature gives.
        more_of: Whose settings it takes, and whose gradients in the end as steps.
        follows: Of the study's schedule, all; or the warm-up alone, where an average of the weights that the optimizer
            keeps stands in for a rate that falls; or nothing, where the module has a schedule of its own.
        clip: Largest norm of the gradient that a step goes by; None for no clipping.
        schedule: Of its learning rate, in place of the study's; None for the study's.
        like: The built-in method that it is a variant of; None for another.
        batch_size: Samples in its training batches, or all the training data, in place of the data's own; None for
            that, whose batches all methods see.
        epochs: Of its runs, in place of the study's; None for that.
        noise: Standard deviation of the white noise that is added to each gradient.
    """

    label: str
    install: Install
    color: str
    line: str
    defaults: Settings = field(default_factory=dict)
    search: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    damping: Mapping[str, Any] | None = None
    control: bool = False
    more_of: tuple[Method, Method] | None = None
    follows: Literal["all", "warm-up", "nothing"] = "all"
    clip: float | None = None
    schedule: Schedule | None = None
    like: Method | None = None
    batch_size: BatchSize | None = None
    epochs: int | None = None
    noise: float = 0.0

    @property
    def damps(self) -> bool:
        """Whether it steps less along the sharpest directions."""
        return self.damping is not None and not self.control

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        """Names of its settings."""
        rule = () if self.damping is None else tuple(n for n in ("gamma", "k") if n not in self.damping)
        return (*self.defaults, *rule)

    @property
    def rates(self) -> tuple[float, float]:
        """Lowest and highest learning rate worth a look: those of the search, else a tenth and ten times its own."""
        return self.search.get("lr") or (self.defaults["lr"] / 10, self.defaults["lr"] * 10)

    def followed(self, schedule: Schedule | None) -> Schedule | None:
        """What its learning rate follows of a study's schedule, or its own; None for no change by the study."""
        schedule = self.schedule or schedule
        if schedule is None or self.follows == "nothing":
            return None
        return schedule if self.follows == "all" else Schedule(warmup=schedule.warmup)

    def schedule_label(self, schedule: Schedule | None) -> str:
        """What its learning rate does in a study with this schedule, in print."""
        return "the module's own" if self.follows == "nothing" else (self.followed(schedule) or Schedule()).label

    def tuned_as(self, name: Method) -> Method:
        """The method whose settings this one takes: itself, but where it is another's with more steps."""
        return name if self.more_of is None else self.more_of[0]

    def directions(self, settings: Mapping[str, float], options: NSGDOptions) -> NSGDOptions | None:
        """Options of its directions, with those of the settings and its own in place of the study's; None without."""
        if self.damping is None:
            return None
        tuned: dict[str, Any] = {name: settings[name] for name in ("gamma", "k") if name in settings}
        if "k" in tuned:
            tuned["k"] = round(tuned["k"])
        return replace(options, **{**tuned, **self.damping})


def made_by(make: Make) -> Install:
    """How a method is installed that is an optimizer of all parameters and nothing else."""

    def install(
        module: pl.LightningModule, settings: Mapping[str, float], damping: Damping, seed: int
    ) -> Callable[[], torch.optim.Optimizer]:
        return lambda: make(module.parameters(), settings, damping, seed)

    return install
