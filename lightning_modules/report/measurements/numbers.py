"""A measurement's numbers, picked out of the rows of its file."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lightning_modules.report.verdicts import Numbers
from lightning_modules.support.files import Rows

ONE_POINT = "one point: no trend can be told"  # in place of whatever a trend would be


def values_of(rows: Rows, quantity: str) -> Numbers:
    """All values of a quantity, in the order of the rows."""
    return np.array([row["value"] for row in rows if row["quantity"] == quantity], dtype=float)


def value_of(rows: Rows, quantity: str, *, of: str | None = None, at: float | None = None) -> float:
    """The first value of a quantity, of what it is of and where it is, if these are given."""
    return float(
        next(
            row["value"]
            for row in rows
            if row["quantity"] == quantity and of in (None, row.get("of")) and at in (None, row.get("at"))
        )
    )


def series(rows: Rows, quantity: str, of: str | None = None) -> tuple[list[float], list[float]]:
    """Steps and values of a quantity, as they are drawn."""
    return columns(
        [(row["step"], row["value"]) for row in rows if row["quantity"] == quantity and of in (None, row.get("of"))]
    )


def by_step(rows: Rows, quantity: str, of: str | None = None) -> dict[int, float]:
    """The value of a quantity at each step that has one."""
    return {row["step"]: row["value"] for row in rows if row["quantity"] == quantity and of in (None, row.get("of"))}


def columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Abscissas and ordinates; what is infinite cannot be drawn."""
    return [x for x, _ in points], [y if math.isfinite(y) else math.nan for _, y in points]


def finite(values: Numbers) -> Numbers:
    """Those of the values that are finite."""
    return values[np.isfinite(values)]


def measured_by(rows: Rows) -> list[Rows]:
    """The rows of each measurement, in the order of the measurements."""
    numbers = sorted({row["measurement"] for row in rows})
    return [[row for row in rows if row["measurement"] == number] for number in numbers]
