"""Numbers from any library, as Python's own; one sentence where they are none, or out of range."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce, wraps
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

_LARGEST = int(np.finfo(np.float64).max)

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
    """Whether this is a number of Python's own, and one that 64 bits hold."""
    return isinstance(value, float) or (type(value) is int and abs(value) < _LARGEST)


def above_zero(name: str, value: Any) -> float:
    """A finite number above 0; a ValueError for anything else."""
    number = plain(value)
    if not is_real(number) or not 0 < number < math.inf:
        raise ValueError(f"expected {name} to be a finite number above 0, got {shown(value)}")
    return float(number)


def at_least_zero(name: str, value: Any) -> float:
    """A finite number of at least 0; a ValueError for anything else."""
    number = plain(value)
    if not is_real(number) or not 0 <= number < math.inf:
        raise ValueError(f"expected {name} to be a finite number of at least 0, got {shown(value)}")
    return float(number)


def below_one(name: str, value: Any) -> float:
    """A number of at least 0 and below 1; a ValueError for anything else."""
    number = plain(value)
    if not is_real(number) or not 0 <= number < 1:
        raise ValueError(f"expected {name} to be a number of at least 0 and below 1, got {shown(value)}")
    return float(number)


def not_zero(name: str, value: Any) -> float:
    """A finite number other than 0; a ValueError for anything else."""
    number = plain(value)
    if not is_real(number) or number == 0 or not math.isfinite(number):
        raise ValueError(f"expected {name} to be a finite number other than 0, got {shown(value)}")
    return float(number)


def check_numbers(**numbers: float) -> None:
    """Raise a ValueError where one of these is NaN or infinite."""
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ValueError(f"expected {name} to be a finite number, got {number}")


def check_vectors(size: int | None = None, **vectors: Tensor) -> None:
    """Raise a ValueError unless these are vectors of one length: the size, or that of the first."""
    for name, vector in vectors.items():
        if vector.ndim != 1 or (size is not None and len(vector) != size):
            wanted = "of one dimension" if size is None else f"of shape ({size},)"
            raise ValueError(f"expected {name} to be a tensor {wanted}, got one of shape {tuple(vector.shape)}")
        size = len(vector)


def check_choice(name: str, value: Any, kind: Any) -> None:
    """Raise a ValueError unless this is one of the texts of a Literal."""
    if not isinstance(value, str) or value not in get_args(kind):
        raise ValueError(f"expected {name} to be one of {', '.join(get_args(kind))}, got {shown(value)}")


def in_float64(value: float | Sequence[float] | Tensor) -> Tensor:
    """Numbers as a tensor in float64: where they are if they are one, else on the CPU, whatever the default device."""
    return value.double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")


def in_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """Tensors in the widest of their dtypes, which is float64 for whole numbers; no copy of those that have it."""
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    return [tensor.to(dtype if dtype.is_floating_point else torch.float64) for tensor in tensors]


def shown(value: Any) -> str:
    """What was got, in a few words of one line."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def of_their_kind(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Check what a function is given by its annotations, at the entry: numbers, real tensors, callables, classes.

    Numbers of any library become Python's own. Ranges and shapes are the function's to check.
    """
    signature = inspect.signature(function)
    annotations = {name: str(parameter.annotation) for name, parameter in signature.parameters.items()}
    kinds = {name: _kinds(annotation, function) for name, annotation in annotations.items()}

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


_CALLABLES = {
    "Closure": "a function that computes the loss",
    "HVP": "a function from (P,) to (P,)",
    "Potential": "a function from arrays (n,) to (n,)",
    "Map": "a function of tensors (n, d)",
    "Update": "a function of a number and a text",
}

_WORDS = {
    "float": "a number",
    "int": "a whole number",
    "bool": "True or False",
    "str": "a text",
    "Tensor": "a dense tensor of real numbers",
    "Sequence[float]": "a sequence of numbers",
    "Sequence[Tensor]": "a sequence of dense tensors of real numbers",
    "NDArray[np.float64]": "an array of numbers (n,)",
    "dict[str, float]": "a dictionary of names and numbers",
    "Callable": "a function",
    "None": "None",
    **_CALLABLES,
}


def _kinds(annotation: str, function: Callable[..., Any]) -> dict[str, type | None]:
    """The kinds in an annotation, those that are classes of the function's own module with their class; or none."""
    kinds: dict[str, type | None] = {}
    for kind in ["Callable"] if annotation.startswith("Callable[") else annotation.split(" | "):
        found = None if kind in _WORDS else inspect.unwrap(function).__globals__.get(kind)
        if kind not in _WORDS and not isinstance(found, type):
            return {}
        kinds[kind] = found
    return kinds


def _of_kind(name: str, value: Any, kinds: Mapping[str, type | None]) -> Any:
    if not kinds:
        return value
    if "Tensor" not in kinds or not isinstance(value, Tensor):
        value = plain(value)
    if "float" in kinds and "int" not in kinds and type(value) is int and is_real(value):
        value = float(value)  # a tensor takes no whole number of more than 64 bits
    if not any(_fits(value, kind, found) for kind, found in kinds.items()):
        words = " or ".join(_WORDS.get(kind, f"a {kind}") for kind in kinds)
        raise ValueError(f"expected {name} to be {words}, got {shown(value)}")
    if "NDArray[np.float64]" in kinds:
        return np.asarray(value, dtype=np.float64)
    return {key: float(plain(number)) for key, number in value.items()} if "dict[str, float]" in kinds else value


def _fits(value: Any, kind: str, found: type | None) -> bool:
    if found is not None:
        return isinstance(value, found)
    if kind in _CALLABLES or kind == "Callable":
        return callable(value)
    if kind in ("Sequence[float]", "NDArray[np.float64]"):
        many = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes)
        return many and all(is_real(plain(item)) for item in value)
    if kind == "Sequence[Tensor]":
        return isinstance(value, list | tuple) and all(isinstance(t, Tensor) and _is_real_tensor(t) for t in value)
    if kind == "dict[str, float]":
        return isinstance(value, Mapping) and all(isinstance(n, str) and is_real(plain(x)) for n, x in value.items())
    if kind == "Tensor":
        return isinstance(value, Tensor) and _is_real_tensor(value)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "float":
        return is_real(value)
    return value is None if kind == "None" else isinstance(value, {"bool": bool, "str": str}[kind])


def _is_real_tensor(value: Tensor) -> bool:
    whole = value.layout == torch.strided and not value.is_meta and not value.is_quantized
    return whole and not value.is_complex() and value.dtype != torch.bool
