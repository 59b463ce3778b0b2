"""Checks of what a checkpoint holds of directions, before anything of it is taken over."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from nsgd.curvature.checks import is_real, plain, shown
from nsgd.curvature.vectors import is_finite
from nsgd.directions.differences import ROWS
from nsgd.directions.kept import DIRECTIONS, FIRST_PASS, LAST
from nsgd.directions.schedule import Counts
from nsgd.directions.shards import parts_of

DAMAGED = "the checkpoint is damaged, so load another"

_LIKE_PARAMETER = (LAST, FIRST_PASS)
_LISTS = ("weights", "eigenvalues", "damped")
_NUMBERS = (*(field.name for field in fields(Counts)), "averaged", "trace", "overlap", "mean_square")
_WHOLE = tuple(field.name for field in fields(Counts) if isinstance(field.default, int))
_STEPS_AT = ("refreshed_at", "attempted_at")  # -1 for never


def check_shape(state_dict: Any) -> None:
    """Raise a ValueError unless it is what an optimizer's ``state_dict()`` gives."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"expected an optimizer's state_dict(), got a {type(state_dict).__name__}; pass that")
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    whole = isinstance(groups, list) and all(map(_is_group, groups))
    if not whole or not isinstance(state, Mapping):
        names = " ".join(", ".join(map(str, state_dict)).split())
        raise ValueError(
            f"expected an optimizer's state_dict(), with state and param_groups, got one with {names or 'nothing'}; "
            f"{DAMAGED}"
        )


def _is_group(group: Any) -> bool:
    """Whether this is a group of a state_dict: options, and numbers in place of the parameters, or names."""
    numbers = group.get("params") if isinstance(group, Mapping) else None
    return isinstance(numbers, list) and all(isinstance(number, int | str) for number in numbers)


def check_followed_flag(value: Any) -> None:
    """Raise a ValueError unless this says whether a group has directions."""
    if not isinstance(plain(value), bool):
        raise ValueError(f"expected curvature of a group to be True or False, got {shown(value)}")


def check_tensors(pairs: Iterable[tuple[dict[str, Any], Tensor]], counts: Mapping[str, Any]) -> None:
    """Raise a ValueError unless tensors are those of the parameters beside them, whole and finite.

    Args:
        pairs: What is saved along each parameter, and the parameter.
        counts: Of the checkpoint.
    """
    least = {DIRECTIONS: len(counts.get("weights", [])), "nsgd_rows": counts.get("rows", {}).get("pending", 0)}
    followed = counts.get("followed", [])
    for n, (entry, p) in enumerate(pairs):
        if n in followed and DIRECTIONS not in entry:
            raise ValueError(f"expected directions along parameter {n} in the checkpoint, got none; {DAMAGED}")
        for name, value in entry.items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"expected {name} of the checkpoint to be real numbers, got {kind}; {DAMAGED}")
            shape = value.shape if name in _LIKE_PARAMETER else value.shape[1:]
            if shape != p.shape:
                raise ValueError(
                    f"expected {name} for a parameter of shape {tuple(p.shape)}, got {tuple(shape)}; the checkpoint is "
                    "of another model"
                )
            if name in least and len(value) < least[name]:
                raise ValueError(
                    f"expected {least[name]} {name} along parameter {n} in the checkpoint, got {len(value)}; {DAMAGED}"
                )
            if name == DIRECTIONS and not is_finite(parts_of([value])[0]):
                raise ValueError(f"expected finite directions in the checkpoint, got NaN or infinity; {DAMAGED}")


def checked_counts(written: Any, parameters: int) -> dict[str, Any]:
    """The counts of a checkpoint, from their JSON text; a ValueError unless all of them are such as a run writes."""
    try:
        counts = json.loads(written)
    except (TypeError, ValueError):  # no text, or no JSON
        counts = None
    if not isinstance(counts, dict):
        raise ValueError(f"expected nsgd_counts of the checkpoint to be a JSON object, got {shown(written)}; {DAMAGED}")
    for name in _LISTS:
        values = counts.get(name)
        if not ((isinstance(values, list) and all(map(_is_finite, values))) or (name == "damped" and values is None)):
            raise _error(name, "a list of numbers", values)
    for name in _NUMBERS:
        value = counts.get(name, 0)
        if not _is_number(value):
            raise _error(name, "a number", value)
        least = -1 if name in _STEPS_AT else 0
        if name in _WHOLE and not (isinstance(value, int) and value >= least):
            raise _error(name, f"a whole number of at least {least}", value)
        if name not in _WHOLE and value < 0:  # NaN is what is not known
            raise _error(name, "a number of at least 0", value)
    _check_places("followed", counts.get("followed", []), parameters)
    if "rows" in counts:
        _check_rows(counts["rows"], parameters)
    return counts


def _check_rows(rows: Any, parameters: int) -> None:
    if not isinstance(rows, dict):
        raise _error("rows", "an object", rows)
    for name, most in (("recorded", math.inf), ("pending", ROWS), ("folds", math.inf), ("patience", math.inf)):
        value = rows.get(name)
        if not isinstance(value, int) or not 0 <= value <= most:
            raise _error(f"rows.{name}", f"a whole number from 0 to {most}", value)
    for name in ("mass", "usual"):
        value = rows.get(name)
        if not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise _error(f"rows.{name}", "a number of at least 0", value)
    for name, count in (("shares", rows["pending"]), ("likeness", 2)):
        values = rows.get(name)
        if not isinstance(values, list) or len(values) != count or not all(map(_is_finite, values)):
            raise _error(f"rows.{name}", f"a list of {count} numbers", values)
    for name, value in (("known", rows.get("known")), ("together", rows.get("together", False))):
        if not isinstance(value, bool):
            raise _error(f"rows.{name}", "true or false", value)
    _check_places("rows.absent", rows.get("absent", []), parameters)


def _check_places(name: str, places: Any, parameters: int) -> None:
    if not isinstance(places, list) or not all(isinstance(n, int) and 0 <= n < parameters for n in places):
        raise _error(name, f"a list of places below {parameters}, the number of parameters", places)


def _error(name: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"expected {name} in nsgd_counts of the checkpoint to be {expected}, got {shown(got)}; {DAMAGED}")


def _is_number(value: Any) -> bool:
    return isinstance(value, bool) or is_real(value)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)
