"""Functions of the user's own, by their import path."""

from __future__ import annotations

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

from lightning_modules.support.nearest import meant


def imported(path: str, *, option: str, known: str) -> Callable[..., Any]:
    """The function that an import path names.

    Args:
        path: module:name.
        option: What it is given for, for messages.
        known: What else that option takes, for messages.

    Raises:
        ValueError: If there is no such function.
    """
    module, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise ValueError(
            f"expected {option} to be one of {known}, or module:name of your own, got {path!r}"
            f"{meant(path, known.split(', '))}"
        )
    try:
        target: Any = resolve_name(path)
    except ImportError as error:
        raise ValueError(f"expected {option} to name a module that can be imported, got {path!r}: {error}") from error
    except AttributeError:
        target = None
    if not callable(target):
        raise ValueError(f"expected {option} to name a function of {module}, got {path!r}, which is none")
    function: Callable[..., Any] = target
    return function
