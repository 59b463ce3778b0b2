"""Tables, as lists of rows, in CSV, and options in YAML: written whole or not at all, and checked when read."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from lightning_modules.support.whole_files import write_bytes_once, write_text

Rows = list[dict[str, Any]]

_MEND = "put it back as it was, or choose another folder with --out"


def write_csv(path: Path, rows: Rows) -> None:
    """Write rows with all their columns, and make the folder."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    """Write plain values in their order, and make the folder."""
    write_text(path, _yaml(values))


def write_yaml_once(path: Path, values: Mapping[str, Any]) -> None:
    """The same, but that a file which is there already stays: of several processes the first one's."""
    write_bytes_once(path, _yaml(values).encode())


def _yaml(values: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(values), sort_keys=False))


def read_csv(path: Path) -> Rows:
    """Rows of a file, numbers as numbers, empty cells left out.

    Raises:
        ValueError: If it is no table: no text in UTF-8, or a row has more or fewer cells than the header.
    """

    def parsed(text: str) -> Any:
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        return text

    try:
        text = path.read_bytes().decode()
        header, *rows = list(csv.reader(StringIO(text, newline=""))) or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"expected {path} to be a table in CSV, got a file that is none ({error}); {_MEND}") from error
    if text and not text.endswith("\n"):
        raise ValueError(f"expected a line break at the end of {path}, got none, as of a file that is cut; {_MEND}")
    for number, row in enumerate(rows, start=1):
        if row and len(row) != len(header):
            raise ValueError(
                f"expected {len(header)} cells in each row of {path}, got {len(row)} in row {number}, as of a "
                f"file that is cut; {_MEND}"
            )
    return [{name: parsed(text) for name, text in zip(header, row, strict=True) if text != ""} for row in rows if row]


def read_yaml(path: Path) -> dict[str, Any]:
    """Options of a file, by name.

    Raises:
        ValueError: If it holds none: no text in UTF-8, no YAML, or nothing.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"expected {path} to hold options in YAML, got a file that is none; {_MEND}") from error
    if not isinstance(values, dict) or not text.endswith("\n"):
        raise ValueError(
            f"expected {path} to hold options in YAML, got a file that is cut, or of another kind; {_MEND}"
        )
    return values


def unused(path: Path) -> Path:
    """The path itself, or with a number where there is one of an earlier run: ``name-1.ext``, ``name-2.ext``, ..."""
    free, number = path, 0
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return free
