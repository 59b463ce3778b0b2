"""Where files go, so that none is overwritten."""

from __future__ import annotations

from pathlib import Path


def unused(path: Path) -> Path:
    """The path itself, or with a number where there is one of an earlier run: ``name-1.ext``, ``name-2.ext``, ..."""
    found, number = path, 0
    while found.exists():
        number += 1
        found = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return found
