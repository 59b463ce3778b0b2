"""Numbers from any library, as Python's own; one sentence where they are none, or out of range."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import wraps
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

import numpy as np
from torch import Tensor

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


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


def count_or_none(name: str, value: Any, *, means: str = "the default") -> int | None:
    """A whole number of at least 1, or None, which stands for something else; a ValueError for anything else."""
    kind = f"None for {means}, or a whole number"
    return None if value is None else whole_number(name, value, least=1, kind=kind)


def is_real(value: Any) -> bool:
    """Whether this is a number of Python's own."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def above_zero(name: str, value: Any) -> float:
    """A finite number above 0; a ValueError for anything else."""
    number = plain(value)
    if not is_real(number) or not 0 < number < math.inf:
        raise ValueError(f"expected {name} to be a finite number above 0, got {shown(value)}")
    return float(number)


def check_vectors(size: int | None = None, **vectors: Tensor) -> None:
    """Raise a ValueError unless these are vectors of one length: the size, or that of the first."""
    for name, vector in vectors.items():
        if vector.ndim != 1 or (size is not None and len(vector) != size):
            wanted = "of one dimension" if size is None else f"of shape ({size},)"
            raise ValueError(f"expected {name} to be a tensor {wanted}, got one of shape {tuple(vector.shape)}")
        size = len(vector)


def shown(value: Any) -> str:
    """What was got, in a few words of one line."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def of_their_kind(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Check what a function is given by its annotations, at the entry: numbers, real tensors, callables.

    Numbers of any library become Python's own. Ranges and shapes are the function's to check.
    """
    signature = inspect.signature(function)
    kinds = {name: str(parameter.annotation) for name, parameter in signature.parameters.items()}

    @wraps(function)
    def checked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{function.__name__}: {error}") from None
        for name, value in given.arguments.items():
            given.arguments[name] = _of_kind(name, value, kinds[name])
        return function(*given.args, **given.kwargs)

    return checked


_LARGEST = int(np.finfo(np.float64).max)

_WORDS = {
    "float": "a number",
    "int": "a whole number",
    "Tensor": "a tensor of real numbers",
    "Sequence[float]": "a sequence of numbers",
    "Closure": "a function that computes the loss",
    "HVP": "a function from (P,) to (P,)",
    "None": "None",
}


def _of_kind(name: str, value: Any, annotation: str) -> Any:
    kinds = annotation.split(" | ")
    if not set(kinds) <= set(_WORDS):
        return value
    if "Tensor" not in kinds or not isinstance(value, Tensor):
        value = plain(value)
    if "float" in kinds and "int" not in kinds and type(value) is int and abs(value) < _LARGEST:
        value = float(value)  # a tensor takes no whole number of more than 64 bits
    fits = {
        "float": is_real(value),
        "int": isinstance(value, int) and not isinstance(value, bool),
        "Tensor": isinstance(value, Tensor) and not value.is_complex(),
        "Sequence[float]": isinstance(value, Sequence | np.ndarray) and all(is_real(plain(item)) for item in value),
        "Closure": callable(value),
        "HVP": callable(value),
        "None": value is None,
    }
    if not any(fits[kind] for kind in kinds):
        words = " or ".join(_WORDS[kind] for kind in kinds)
        raise ValueError(f"expected {name} to be {words}, got {shown(value)}")
    return value
