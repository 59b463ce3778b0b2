"""Numbers from any library, as Python's own; one sentence where they are none, or out of range."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor


def plain(value: Any) -> Any:
    """A number of any library, such as a tensor without dimensions, as Python's own; anything else as it is.

    Reads a tensor, for which the host waits.
    """
    if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def whole_number(name: str, value: Any, *, least: int, most: int | None = None, kind: str = "a whole number") -> int:
    """A whole number in a range; a ValueError for anything else."""
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ValueError(f"expected {name} to be {kind} of at least {least}, got {shown(value)}")
    if most is not None and number > most:
        raise ValueError(f"expected {name} of at most {most}, got {shown(value)}")
    return number


def is_real(value: Any) -> bool:
    """Whether this is a number of Python's own."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def above_zero(name: str, value: Any) -> float:
    """A finite number above 0; a ValueError for anything else."""
    number = plain(value)
    if not is_real(number) or not 0 < number < math.inf:
        raise ValueError(f"expected {name} to be a finite number above 0, got {shown(value)}")
    return float(number)


def shown(value: Any) -> str:
    """What was got, in a few words of one line."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
