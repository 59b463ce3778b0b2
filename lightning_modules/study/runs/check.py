"""What is refused of a study, in one sentence, before anything is trained or written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from pytorch_lightning.utilities.model_helpers import is_overridden

from lightning_modules.callbacks.measurements import make_measurements
from lightning_modules.models.base import Split
from lightning_modules.study.methods import RECIPES, prepare
from lightning_modules.study.methods.any_optimizer import check_range
from lightning_modules.study.options import Study
from lightning_modules.study.runs.evaluate import logged_scores, wanted_scores
from lightning_modules.study.runs.subject import Subject
from lightning_modules.support.nearest import meant
from lightning_modules.support.read_outs import average, averages
from lightning_modules.support.score import TRAIN_LOSS


def check_study(subject: Subject) -> None:
    """Refuse what cannot run: options by themselves, then every method on the module, then what the module logs.

    Args:
        subject: What the study trains. It is made once for each method, and validated and tested on one batch.

    Raises:
        ValueError: In one sentence, with what was given, what was expected and what to do.
    """
    study = subject.study
    _ = subject.devices
    _check_numbers(study)
    _check_augment(study)
    _check_methods(study)
    _check_batches(study)
    _check_settings(study)
    _check_search(study)
    make_measurements(study.measure, samples=study.measure_samples, overhead=study.measure_overhead)
    _check_training(subject)
    if study.model is not None or study.monitor is not None:
        _check_scores(subject)
    _check_endpoint(subject)


# The least and the most of each, which a machine can plan.
_COUNTS = {
    "seeds": (1, 10_000),
    "epochs": (1, 10**9),
    "threads": (1, 1024),
    "tune": (0, 10_000),
    "sweep_points": (2, 10_000),
    "sweep_seeds": (1, 10_000),
}


def _check_numbers(study: Study) -> None:
    for name, (least, most) in _COUNTS.items():
        if (count := getattr(study, name)) < least:
            raise ValueError(f"expected {name} of at least {least}, got {count}")
        if count > most:
            raise ValueError(f"expected {name} of at most {most:,}, got {count:.6g}")
    if study.limit_test is not None and study.limit_test < 1:
        raise ValueError(f"expected limit_test to be a number of batches of at least 1, got {study.limit_test}")
    if study.schedule is not None:
        study.schedule.check()
    if study.spectrum is not None:
        study.spectrum.check()
    averages(study.averages)
    if study.sweep not in (None, "lr"):
        raise ValueError(f"expected sweep to be lr or null, got {study.sweep!r}")
    for name in ("lr", "weight_decay"):
        if (value := getattr(study, name)) is not None and not 0 <= value < math.inf:
            raise ValueError(f"expected {name} >= 0 and finite, got {value}")
    if study.target is not None and study.model is None and study.score.is_share and not 0 < study.target < 1:
        raise ValueError(f"expected target to be an accuracy between 0 and 1, got {study.target}")
    if study.target is not None and not math.isfinite(study.target):
        raise ValueError(f"expected target to be finite, got {study.target}")
    if study.mode not in (None, "min", "max"):
        raise ValueError(f"expected mode to be min, max or null, got {study.mode!r}")
    if study.model is not None and study.sizes is not None:
        raise ValueError(f"expected no sizes with a model, whose options are its own, got {study.sizes}")


def _check_augment(study: Study) -> None:
    """It is an option of the data's, by its name."""
    data = study.data
    if study.augment is None or isinstance(getattr(data, "augment", None), bool):
        return
    got = "none, for the module has loaders of its own" if data is None else f"{type(data).__name__}, which has none"
    raise ValueError(f"expected data with an option augment for augment {study.augment}, got {got}; leave augment out")


def _check_batches(study: Study) -> None:
    """A batch size of a method's own is an option of the data's, by its name."""
    data = study.data
    own = [recipe for recipe in study.recipes.values() if recipe.batch_size is not None]
    if not own or isinstance(getattr(data, "batch_size", None), int):
        return
    got = "none, for the module has loaders of its own" if data is None else f"{type(data).__name__}, which has none"
    raise ValueError(
        f"expected data with an option batch_size for batch_size {own[0].batch_size} of {own[0].label}, got {got}; "
        "leave batch_size out"
    )


def _check_methods(study: Study) -> None:
    """Each is known; those that take the settings of others come with them; what is searched is not given."""
    for method, recipe in study.recipes.items():
        wanted = recipe.more_of or ()
        if missing := [m for m in wanted if m not in study.recipes]:
            raise ValueError(
                f"{method} takes its settings and its gradients from {' and '.join(wanted)}; "
                f"expected them among the methods, got no {' and no '.join(missing)}"
            )
    for name in ("lr", "weight_decay"):
        value = getattr(study, name)
        if value is not None and study.tune and any(name in study.ranges(method) for method in study.recipes):
            raise ValueError(
                f"expected no {name} with tune, whose trials look for it, got {value}; leave one of them out"
            )


def _check_settings(study: Study) -> None:
    _check_names(study, "settings", study.settings)
    _check_names(study, "search", study.search)
    for method, values in study.settings.items():
        for name, value in values.items():
            if not 0 <= value < math.inf or (name == "momentum" and value >= 1):
                wanted = "below 1" if name == "momentum" else "finite"
                raise ValueError(f"expected settings.{method}.{name} >= 0 and {wanted}, got {value}")


def _check_search(study: Study) -> None:
    for method, ranges in study.search.items():
        for name, ends in ranges.items():
            check_range(f"search.{method}.{name}", ends)
            if name == "momentum" and ends[1] >= 1:
                raise ValueError(f"expected search.{method}.momentum below 1, got {ends}")


def _check_names(study: Study, option: str, values: Mapping[str, Iterable[str]]) -> None:
    """Settings and ranges belong to methods that have them."""
    known = {m: recipe for m, recipe in {**RECIPES, **study.recipes}.items() if not recipe.more_of}
    for method, names in values.items():
        if method not in known:
            near = meant(method, known)
            raise ValueError(f"expected {option} of a method among {', '.join(known)}, got {method!r}{near}")
        taken = known[method].hyperparameters
        if unknown := [name for name in names if name not in taken]:
            raise ValueError(
                f"expected {option} of {method} to be among {', '.join(taken) or 'none at all'}, got {unknown[0]!r}"
                f"{meant(unknown[0], taken)}"
            )


def _check_training(subject: Subject) -> None:
    """Every method can train the module, at its settings and at the largest that are searched; and there are data."""
    study = subject.study
    for method, recipe in study.recipes.items():
        largest = {name: ends[1] for name, ends in study.ranges(method).items()} if study.tune else {}
        module = subject.module()
        prepare(module, recipe, {**study.given(method), **largest}, study.nsgd, schedule=study.schedule)
        # The scaler takes one gradient a step; methods that take more, such as SAM, step by themselves.
        if study.precision == "16-mixed" and not module.automatic_optimization:
            raise ValueError(
                f"expected a precision without a gradient scaler for {method}, which takes two gradients a step, got "
                f"16-mixed; take bf16-mixed, or leave {method} out"
            )
        if recipe.clip is not None and not module.automatic_optimization:
            raise ValueError(
                f"expected clip of a method that takes one gradient a step, got {method}, which takes two; leave it out"
            )
        module.configure_model()
        if not is_overridden("setup", module):  # which may make layers, from the data
            try:
                module.configure_optimizers()
            except RuntimeError:  # one of the module's own, which may ask for its trainer, has none yet
                if recipe.follows != "nothing":
                    raise
        if (options := recipe.directions(study.given(method), study.nsgd)) is not None:
            for callback in options.refresh():
                callback.check_samples([options.solver], module)
    for method, recipe in study.recipes.items():
        if subject.steps(method) < 1:
            raise ValueError(f"expected a batch of training data at least, got none for {recipe.label}")
        if {"quadratic", "all"} & set(study.measure) and subject.steps(method) < 2 * (recipe.epochs or study.epochs):
            raise ValueError(
                f"expected two batches of training data at least, which quadratic compares, got one for "
                f"{recipe.label}; leave quadratic out of measure"
            )
        schedule = recipe.followed(study.schedule)
        own = [] if schedule is None or schedule.average is None else [schedule.average]
        for name in own or study.averages:
            average(name).check(subject.steps(method))


def _check_scores(subject: Subject) -> None:
    """Validate, and test, on one batch: what is to be compared has to be logged there."""
    module, data, score = subject.module(), subject.data(), subject.study.score
    kind = type(module).__name__
    if not is_overridden("validation_step", module) or subject.loader("val") is None:
        raise ValueError(
            f"expected {kind} to have a validation_step, and its data a val_dataloader, got none; a study compares "
            "what is logged there"
        )
    stages: dict[Split, str] = {"val": score.monitor, **({"test": score.tested} if subject.is_tested else {})}
    for stage, name in stages.items():
        judge = subject.trainer(**{f"limit_{stage}_batches": 1})
        logged = logged_scores(judge, module, data, stage)
        if name not in wanted_scores(logged, stage, score):
            mend = "name what it logs there with --monitor" if stage == "val" else "log it there as well"
            raise ValueError(
                f"expected {kind} to log {name} in {'validation' if stage == 'val' else 'its test'}, got "
                f"{', '.join(logged) or 'nothing'}; {mend}"
            )


def _check_endpoint(subject: Subject) -> None:
    """What a study is judged by is the training loss, or its score where there is one."""
    score, given = subject.study.score, subject.study.endpoint
    known = ["score", TRAIN_LOSS.column, score.monitor, *([score.tested] if subject.is_tested else [])]
    if given not in known:
        untested = "" if subject.is_tested or given != score.tested else ", but there is no test"
        raise ValueError(
            f"expected endpoint to be {', '.join(dict.fromkeys(known))}, got {given!r}{untested}{meant(given, known)}; "
            "name another quantity with --monitor"
        )
