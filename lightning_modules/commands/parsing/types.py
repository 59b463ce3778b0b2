"""Types of options in words: "a whole number or 'auto'"."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import torch
from jsonargparse.typing import register_type
from torch import Tensor

_PLAIN = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    torch.dtype: "a precision by its name, such as bfloat16",
}
_MANY = {int: "whole numbers", float: "numbers", bool: "true or false", str: "texts", torch.dtype: "precisions"}
_UNSAID = (NoneType, Tensor)  # no word of a command line makes a tensor


def _dtype(name: Any) -> torch.dtype:
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"expected a precision of torch by its name, such as bfloat16, got {name!r}")
    return found


# No class of which a command line could make one.
register_type(torch.dtype, serializer=str, deserializer=_dtype, fail_already_registered=False)


def described(kind: Any) -> str:
    """A type in words, without None."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(map(repr, parts))
    if origin in (Union, UnionType):
        return " or ".join(described(part) for part in parts if part not in _UNSAID)
    if _is_mapping(kind):
        return f"a mapping of names to {_several(parts[1])}" if parts and parts[1] is not Any else "a mapping"
    if _is_list(kind):
        return f"a list of {_several(parts[0])}" if parts else "a list"
    name = getattr(kind, "__name__", str(kind))
    return _PLAIN.get(kind) or f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def takes_only_classes(kind: Any) -> bool:
    """Whether every value of a type, but None, is an object of a class, or a list of these."""
    leaves = [leaf for leaf in _leaves(kind) if leaf not in _UNSAID]
    return bool(leaves) and all(isinstance(leaf, type) and leaf not in _PLAIN for leaf in leaves)


def takes_null(kind: Any) -> bool:
    """Whether None is of a type."""
    return any(leaf in (None, NoneType, Any) or isinstance(leaf, TypeVar) for leaf in _leaves(kind))


def known_classes(kind: Any) -> set[str]:
    """Names of the classes that a type takes, of those that are imported, but of the bases that it names."""
    bases = [leaf for leaf in _leaves(kind) if isinstance(leaf, type) and leaf not in (*_PLAIN, *_UNSAID)]
    classes: set[type] = set()
    while bases:
        new: set[type] = set(type.__subclasses__(bases.pop())) - classes
        bases += new
        classes |= new
    return {one.__name__ for one in classes}


def choices_of(kind: Any) -> list[str]:
    """The words that a type takes, of those that take certain words alone."""
    return [str(part) for leaf in _leaves(kind) if get_origin(leaf) is Literal for part in get_args(leaf)]


def _several(kind: Any) -> str:
    if get_origin(kind) is Literal or kind in _MANY:
        return _MANY.get(kind) or described(kind)
    if isinstance(kind, type):
        return f"{kind.__name__}s"
    return described(kind).replace("a mapping of", "mappings of").replace("a list of", "lists of")


def _leaves(kind: Any) -> Iterator[Any]:
    if get_origin(kind) in (Union, UnionType) or _is_list(kind):
        for part in get_args(kind):
            yield from _leaves(part)
    else:
        yield kind


def _is_mapping(kind: Any) -> bool:
    origin = get_origin(kind) or kind
    return isinstance(origin, type) and issubclass(origin, Mapping | dict)


def _is_list(kind: Any) -> bool:
    origin = get_origin(kind) or kind
    return isinstance(origin, type) and origin is not str and origin in (list, tuple, Iterable, set)
