"""Files that are there whole or not at all: tables, as lists of rows, in CSV; options in YAML."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

Rows = list[dict[str, Any]]


def write_csv(path: Path, rows: Rows) -> None:
    """Write rows with all their columns."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values in their order."""
    partial = _partial(path)
    partial.write_text(yaml.safe_dump(dict(values), sort_keys=False))
    partial.replace(path)


def write_yaml_once(path: Path, values: Mapping[str, Any]) -> None:
    """The same, but that a file which is there already stays: of several processes the first one's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.write_text(yaml.safe_dump(dict(values), sort_keys=False))
    try:
        path.hardlink_to(partial)
    except FileExistsError:
        pass
    except OSError:  # a file system without links: the last one wins
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    """A name of its own: runs in several processes may write the same file at the same time."""
    return path.with_name(f"{path.name}.{uuid4().hex}.partial")


def read_csv(path: Path) -> Rows:
    """Rows of a file, numbers as numbers, empty cells left out."""

    def parsed(text: str) -> Any:
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        return text

    with path.open(newline="") as file:
        return [{name: parsed(text) for name, text in row.items() if text != ""} for row in csv.DictReader(file)]


def unused(path: Path) -> Path:
    """The path itself, or with a number where there is one of an earlier run: ``name-1.ext``, ``name-2.ext``, ..."""
    free, number = path, 0
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free
