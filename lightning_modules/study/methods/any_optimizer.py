"""Any optimizer as a method of a study: {class_path, init_args, search, damped, label}, in place of a name."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pkgutil import resolve_name
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_modules.callbacks.evaluation_weights import has_evaluation_weights
from lightning_modules.study.methods.recipe import Damping, Method, Recipe, Settings, made_by
from lightning_modules.support.nearest import meant
from nsgd import damp
from nsgd.damping.step import Damped

_KEYS = ("class_path", "init_args", "search", "damped", "label")


def with_rule(optimizer: Optimizer, damping: Damping, seed: int) -> Optimizer:
    """Put the rule on an optimizer, in place, where there are options of it.

    Raises:
        ValueError: If the optimizer cannot be damped.
    """
    if damping is None:
        return optimizer
    name = type(optimizer).__name__
    if isinstance(optimizer, Damped):
        raise ValueError(f"expected an optimizer to damp that has no directions yet, got {name}; take it undamped")
    if has_evaluation_weights(optimizer):
        raise ValueError(
            f"expected an optimizer to damp whose steps move nothing but the weights, got {name}, which averages them "
            "itself; take it undamped"
        )
    return damp(optimizer, seed=seed, **damping)


def entry_recipe(
    entry: Mapping[str, Any], *, color: str, line: str, taken: Collection[Method] = ()
) -> tuple[Method, Recipe]:
    """Name and recipe of an optimizer that is given by its class.

    Args:
        entry: ``class_path`` and, as far as they are given, ``init_args`` of the class; ``search``, ranges of the
            trials (without it, lr from a tenth of its value to ten times that); ``damped``, whether the rule is put on
            it; ``label``, what it is called in print. Its name is the label in lower case with hyphens, else that of
            the class in lower case, or of its path where a built-in method has that, after ``damped-`` where it is
            damped.
        color: Of its curves.
        line: Of its curves.
        taken: Names that it cannot have.

    Raises:
        ValueError: If it is not an optimizer that a study can make.
    """
    if unknown := [key for key in entry if key not in _KEYS]:
        raise ValueError(f"expected a method to have {', '.join(_KEYS)}, got {unknown[0]!r}{meant(unknown[0], _KEYS)}")
    path, label, damped = entry.get("class_path"), entry.get("label"), entry.get("damped", False)
    init_args, search = entry.get("init_args") or {}, entry.get("search") or {}
    for key, value, wanted, words in (
        ("class_path", path, str, "the import path of an optimizer, such as torch.optim.RMSprop"),
        ("init_args", init_args, Mapping, "a mapping of options of the class, such as {lr: 0.01}"),
        ("search", search, Mapping, "a mapping of ranges, such as {lr: [1e-4, 1e-1]}"),
        ("damped", damped, bool, "true or false"),
        ("label", label, str | None, "a text"),
    ):
        if not isinstance(value, wanted):
            raise ValueError(f"expected {key} of a method to be {words}, got {value!r}")
    assert isinstance(path, str)
    kind = _class(path)
    named = kind.__name__ if label is None else label
    prefixes = ("damped-", "damped ") if damped and label is None else ("", "")
    name = prefixes[0] + slug(named)
    if name in taken and label is None:
        name = prefixes[0] + slug(path)
    if name in taken or not slug(named):
        kept = "another than those of the methods that are built in" if slug(named) else "with a letter or a digit"
        raise ValueError(f"expected label of {path} to be {kept}, got {label!r}; choose another")
    defaults, fixed = _settings(kind, path, init_args, search)
    for option, ends in search.items():
        check_range(f"search.{option} of {path}", ends)
    ranges = {option: (float(low), float(high)) for option, (low, high) in search.items()}
    if not ranges and not defaults["lr"] > 0:
        raise ValueError(f"expected lr of {path} above 0, got {defaults['lr']:g}; give init_args.lr, or search.lr")

    def make(params: Iterable[torch.nn.Parameter], settings: Mapping[str, float], damping: Damping, seed: int) -> Any:
        try:
            optimizer = kind(params, **{**fixed, **{option: settings[option] for option in defaults}})
        except (TypeError, ValueError) as error:
            said = " ".join(str(error).split())
            raise ValueError(
                f"expected {path} to train all parameters of the model with init_args {dict(init_args)}, got: {said}; "
                "change init_args, or take another optimizer"
            ) from error
        return with_rule(optimizer, damping, seed)

    recipe = Recipe(
        prefixes[1] + named,
        made_by(make),
        color,
        line,
        defaults,
        ranges,
        damping={} if damped else None,
        follows="warm-up" if has_evaluation_weights(kind) else "all",
    )
    return name, recipe if ranges else replace(recipe, search={"lr": recipe.rates})


def slug(words: str) -> str:
    """Words as the name of a method: in lower case, with hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def check_range(name: str, ends: Any) -> None:
    """Raise a ValueError unless a range is a lower and a higher number above 0."""
    numbers = isinstance(ends, Sequence) and all(isinstance(end, int | float) for end in ends)
    if not numbers or len(ends) != 2 or not 0 < ends[0] < ends[1] < math.inf:
        swapped = numbers and len(ends) == 2 and 0 < ends[1] < ends[0] < math.inf
        mend = f"; its ends are swapped, give {[ends[1], ends[0]]}" if swapped else ""
        raise ValueError(f"expected {name} to be a lower and a higher number above 0, got {ends}{mend}")


def _class(path: str) -> type[Optimizer]:
    try:
        found = resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"expected class_path to be an optimizer that can be imported, got {path!r}: {error}{_nearest(path)}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ValueError(
            f"expected class_path to be a class of torch.optim.Optimizer's kind, got {path!r}, which is none; name one "
            "such as torch.optim.RMSprop"
        )
    if issubclass(found, Damped):
        raise ValueError(
            f"expected class_path to be an optimizer without directions of its own, got {path!r}; take the method "
            "nsgd, whose options are --nsgd, or torch.optim.SGD with damped: true"
        )
    return found


def _nearest(path: str) -> str:
    module, _, name = path.rpartition(".")
    try:
        return meant(name, vars(resolve_name(module)))
    except (ImportError, AttributeError, ValueError, TypeError):
        return "; give the whole path, such as torch.optim.RMSprop"


def _settings(
    kind: type[Optimizer], path: str, init_args: Mapping[str, Any], search: Mapping[str, Any]
) -> tuple[Settings, dict[str, Any]]:
    """What of a class a study can set and tune, with its values, and what stays as it is given."""
    parameters = list(inspect.signature(kind).parameters.values())
    if not parameters:
        raise ValueError(
            f"expected {path} to take the parameters that it trains as its first argument, got a class without any; a "
            "study cannot make it"
        )
    first, *rest = parameters
    options = {p.name: p for p in rest if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in (first, *rest))
    if first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD) or first.name == "lr":
        raise ValueError(
            f"expected {path} to take the parameters that it trains as its first argument, got {first.name}; a study "
            "cannot make it"
        )
    if "lr" not in options:
        raise ValueError(
            f"expected {path} to take a learning rate as lr, got {', '.join(options) or 'no option'}; a study compares "
            "methods at their rates, so wrap it in a class that has one"
        )
    for name in (*init_args, *search):
        if name not in options and not (takes_any and name in init_args):
            raise ValueError(
                f"expected options of {path} among {', '.join(options)}, got {name!r}{meant(name, options)}"
            )
    values = {"lr": options["lr"].default}
    if "weight_decay" in options:
        values["weight_decay"] = options["weight_decay"].default
    values |= {name: options[name].default for name in search} | dict(init_args)
    tuned = {name: float(v) for name, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    if missing := next((name for name in ("lr", *search) if name not in tuned), None):
        raise ValueError(
            f"expected init_args.{missing} of {path} to be a number, which the class has no default of, got "
            f"{init_args.get(missing, 'none')}; give it"
        )
    if counts := [n for n in search if isinstance(values[n], int) and n not in ("lr", "weight_decay")]:
        raise ValueError(
            f"expected search of {path} to be of options that are no whole numbers, got {counts[0]}, which is "
            f"{values[counts[0]]}; set it in init_args"
        )
    # Whole numbers, such as a count of steps, stay what they are; lists are tuples in Python, such as betas.
    whole = [n for n in init_args if isinstance(init_args[n], int) and n not in ("lr", "weight_decay", *search)]
    fixed = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in init_args.items()
        if name not in tuned or name in whole
    }
    return {name: value for name, value in tuned.items() if name not in whole}, fixed
