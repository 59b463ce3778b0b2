"""Copies of what a forward pass may change: the attributes of a module, and the batch that it is given."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Batch = TypeVar("Batch")

# Entries of a tensor inside a container that is copied, at least: what a module keeps of its data is only read.
_LARGE = 1 << 20

_CONTAINERS = (list, tuple, dict, defaultdict, OrderedDict, set, deque)
_GENERATORS = np.random.Generator | np.random.RandomState | random.Random


def copied_attributes(module: nn.Module, copies: dict[int, Any]) -> dict[str, Any]:
    """The attributes of a module, where tensors, containers and plain objects of the user's are copies.

    Parameters, modules and what is neither stay themselves. A tensor inside a container that is larger than 2^20
    entries and than all parameters of the module is taken for data, and stays itself as well.

    Args:
        module: The module; its children are left alone.
        copies: Copies so far by the identity of what they are of, so that what two share stays shared.
    """
    limit = max(_LARGE, sum(p.numel() for p in module.parameters() if not is_lazy(p)))
    return {name: _attribute(value, copies, limit) for name, value in vars(module).items()}


def _attribute(value: Any, copies: dict[int, Any], limit: int) -> Any:
    if isinstance(value, Tensor):
        return _tensor(value, copies)
    if not _is_own(value):
        return _container(value, copies, limit)
    if id(value) not in copies:
        same = copies[id(value)] = object.__new__(type(value))
        same.__dict__.update({name: _container(inner, copies, limit) for name, inner in vars(value).items()})
    return copies[id(value)]


def _is_own(value: Any) -> bool:
    """Whether an attribute is a plain object of the user's, such as a meter that sums up losses."""
    cls: Any = type(value)
    foreign = cls.__module__.split(".")[0] in ("torch", "torchmetrics", "pytorch_lightning", "lightning", "builtins")
    plain = cls.__new__ is object.__new__ and hasattr(value, "__dict__") and not hasattr(cls, "__slots__")
    return plain and not foreign and not callable(value) and not isinstance(value, nn.Module | type)


def _tensor(value: Tensor, copies: dict[int, Any]) -> Tensor:
    """A copy with its graph, if it has one; but a leaf that trains is what gradients are taken with respect to."""
    if isinstance(value, nn.Parameter) or (value.requires_grad and value.is_leaf):
        return value
    if id(value) not in copies:
        copies[id(value)] = value.clone()
    found: Tensor = copies[id(value)]
    return found


def _container(value: Any, copies: dict[int, Any], limit: int) -> Any:
    """A copy of a Python container and of what it holds, and of a generator; everything else is itself."""
    if isinstance(value, Tensor):
        return value if value.numel() > limit else _tensor(value, copies)
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, _GENERATORS):
        return copy.deepcopy(value)
    if type(value) not in _CONTAINERS:
        return value
    if type(value) is tuple:
        return tuple(_container(item, copies, limit) for item in value)
    if id(value) in copies:
        return copies[id(value)]
    same = copies[id(value)] = copy.copy(value)
    if isinstance(same, dict):
        same.update((key, _container(item, copies, limit)) for key, item in value.items())
    elif isinstance(same, list | deque):
        for i, item in enumerate(value):
            same[i] = _container(item, copies, limit)
    return same


def fresh_batch(batch: Batch) -> Batch:
    """A copy of a batch, for a loss that consumes or changes what it is given; costs its tensors once more.

    Containers and objects are copied as by ``copy.deepcopy``, tensors by their entries alone, not by the storage that
    they are a view of. Modules and parameters stay themselves.

    Raises:
        ValueError: If the batch holds what cannot be copied: an iterator that runs once, an open file.
    """
    copies: dict[int, Any] = {}
    _note_tensors(batch, copies, set())
    try:
        return copy.deepcopy(batch, copies)
    except Exception as error:  # of any kind: classes raise what they want
        raise ValueError(
            f"expected a batch that can be copied, as its loss is computed again, got a {type(batch).__name__} that "
            f"holds what can be read once only, such as a generator or an open file ({error}); put what it yields "
            "into the batch"
        ) from error


def _note_tensors(value: Any, copies: dict[int, Any], seen: set[int]) -> None:
    """Copy the tensors in a batch, so that ``deepcopy`` finds them done."""
    if id(value) in seen or isinstance(value, str | bytes | int | float | complex | type | None):
        return
    seen.add(id(value))
    if isinstance(value, nn.Module | nn.Parameter):
        copies[id(value)] = value
    elif isinstance(value, Tensor):
        leaf = value.requires_grad and value.is_leaf
        copies[id(value)] = value.detach().clone().requires_grad_() if leaf else value.clone()
    else:
        inner = list(value.values()) if isinstance(value, Mapping) else []
        if isinstance(value, list | tuple | set | deque):
            inner += value
        for item in (*inner, *getattr(value, "__dict__", {}).values()):
            _note_tensors(item, copies, seen)
