"""A variant of a built-in method: {like: sgd} with what differs, in place of a name."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from typing import Any

from lightning_modules.study.methods.any_optimizer import check_range, slug
from lightning_modules.study.methods.recipe import Method, NSGDOptions, Recipe
from lightning_modules.study.methods.schedule import Schedule
from lightning_modules.support.nearest import meant

_KEYS = ("like", "nsgd", "settings", "search", "clip", "schedule", "batch_size", "epochs", "noise", "label")


def variant_recipe(
    entry: Mapping[str, Any], *, color: str, line: str, built_in: Mapping[Method, Recipe], taken: Collection[Method]
) -> tuple[Method, Recipe]:
    """Name and recipe of a built-in method with some of its options changed.

    Args:
        entry: ``like``, the method's name, and as far as they are given ``nsgd``, options of the directions in place of
            the study's; ``settings``, hyperparameters in place of the method's; ``search``, ranges in place of the
            method's, {} for no trials; ``clip``, the gradient's largest norm; ``schedule``, of its learning rate in
            place of the study's; ``batch_size``, of training batches in place of the data's, or "all"; ``epochs`` in
            place of the study's; ``noise``, the standard deviation of white noise on each gradient; ``label``, what it
            is called in print, without which it says what is changed. Its name is the label in lower case with hyphens.
        color: Of its curves.
        line: Of its curves.
        built_in: The methods it may be like.
        taken: Names that it cannot have.

    Raises:
        ValueError: If there is no such method, or it has no such option.
    """
    if unknown := [key for key in entry if key not in _KEYS]:
        raise ValueError(f"expected a variant to have {', '.join(_KEYS)}, got {unknown[0]!r}{meant(unknown[0], _KEYS)}")
    like, label, clip, noise = entry["like"], entry.get("label"), entry.get("clip"), entry.get("noise")
    size, epochs = entry.get("batch_size"), entry.get("epochs")
    parts = {key: entry.get(key) for key in ("nsgd", "settings", "search", "schedule")}
    if not isinstance(like, str) or like not in built_in:
        near = meant(like, built_in) if isinstance(like, str) else ""
        raise ValueError(f"expected like to be among {', '.join(built_in)}, got {like!r}{near}")
    for key, value in parts.items():
        if not isinstance(value, Mapping | None):
            raise ValueError(f"expected {key} of a variant of {like} to be a mapping, got {value!r}")
    if not isinstance(label, str | None):
        raise ValueError(f"expected label of a variant of {like} to be a text, got {label!r}")
    for key, value, kind in (("clip", clip, "a norm"), ("noise", noise, "a standard deviation")):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < math.inf):
            raise ValueError(f"expected {key} of a variant of {like} to be {kind} above 0, got {value!r}")
    for key, value, more in (("batch_size", size, ', or "all"'), ("epochs", epochs, "")):
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value is not None and not whole and not (more and value == "all"):
            raise ValueError(f"expected {key} of a variant of {like} to be a number of at least 1{more}, got {value!r}")
    recipe = built_in[like]
    if recipe.more_of is not None:
        raise ValueError(f"expected like to be a method with settings of its own, got {like}; take {recipe.more_of[0]}")
    if parts["nsgd"] and recipe.damping is None:
        raise ValueError(f"expected nsgd in a variant of a method with directions, got one of {like}; leave it out")
    known = {f.name: f for f in fields(NSGDOptions)}
    changed, settings, search, scheduled = (dict(value or {}) for value in parts.values())
    _check_names("nsgd", like, changed, known)
    _check_names("settings", like, settings, recipe.defaults)
    _check_names("search", like, search, [name for name in recipe.hyperparameters if name not in changed])
    for option, ends in search.items():
        check_range(f"search.{option} of a variant of {like}", ends)
    for option, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"expected settings.{option} of a variant of {like} to be a number, got {value!r}")
    words = [f"{name} {value}" for name, value in (changed | settings).items()]
    words += [] if clip is None else [f"clipped at {clip:g}"]
    words += [] if size is None else ["batch of all" if size == "all" else f"batch {size}"]
    words += [] if epochs is None else [f"{epochs} epochs"]
    words += [] if noise is None else [f"noise {noise:g}"]
    schedule = None if parts["schedule"] is None else Schedule.of(scheduled)
    if schedule is not None and recipe.follows != "all":
        raise ValueError(f"expected no schedule in a variant of {like}, whose rate a study does not set; leave it out")
    words += [] if schedule is None else [schedule.label]
    named = label if label is not None else ", ".join([recipe.label, *words])
    if not slug(named) or slug(named) in taken:
        raise ValueError(f"expected the label of a variant of {like} to be one of its own, got {named!r}; give another")
    found = replace(
        recipe,
        label=named,
        color=color,
        line=line,
        defaults=recipe.defaults | {name: float(value) for name, value in settings.items()},
        damping=None if recipe.damping is None else {**recipe.damping, **changed},
        clip=None if clip is None else float(clip),
        schedule=schedule,
        like=like,
        batch_size=size,
        epochs=epochs,
        noise=float(noise or 0.0),
    )
    if parts["search"] is not None:
        found = replace(found, search={option: (float(low), float(high)) for option, (low, high) in search.items()})
    return slug(named), found


def _check_names(key: str, like: Method, given: Mapping[str, Any], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(
                f"expected {key} of a variant of {like} to be among {', '.join(known)}, got {name!r}"
                f"{meant(str(name), known)}"
            )
