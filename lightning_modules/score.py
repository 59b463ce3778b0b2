"""What the runs of a study are compared by: a quantity that their module logs in validation and test, and the loss."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Measure:
    """A number of a run, and how it is called and printed."""

    column: str  # in results.csv
    label: str
    lower_is_better: bool
    factor: int = 1  # from the number to what is printed
    digits: int = 4
    unit: str = ""
    difference_unit: str = ""

    def badness(self, row: Mapping[str, Any]) -> float:
        """What the best row has least of; infinite where it diverged, or is missing."""
        value = float(row.get(self.column, math.nan))
        if not math.isfinite(value):
            return math.inf
        return value if self.lower_is_better else -value

    @property
    def title(self) -> str:
        """Of a table or an axis."""
        return f"{self.label[0].upper()}{self.label[1:]}{self.unit and ', ' + self.unit.strip()}"


@dataclass(frozen=True)
class Score:
    """A quantity by the name that a module logs it under in validation, and whether less of it or more is better."""

    monitor: str
    mode: Mode

    @property
    def tested(self) -> str:
        """Its name in a test: that of validation with "test" in place of the first "valid" or "val"."""
        stage = next((stage for stage in ("validation", "valid", "val") if stage in self.monitor), "")
        return self.monitor.replace(stage, "test", 1) if stage else f"test_{self.monitor}"

    @property
    def is_share(self) -> bool:
        """Whether it is an accuracy, which is printed in per cent."""
        return self.monitor.endswith(("accuracy", "acc"))

    @property
    def validation(self) -> Measure:
        """The quantity in validation."""
        return self._measure(self.monitor)

    @property
    def sign(self) -> int:
        """1 where more is better, -1 where less is."""
        return 1 if self.mode == "max" else -1

    def criterion(self, columns: Collection[str]) -> Measure:
        """What the settings of a method are chosen by: the validation loss, or this where none is logged."""
        return _VAL_LOSS if _VAL_LOSS.column in columns else self.validation

    def measures(self, columns: Collection[str]) -> list[Measure]:
        """What results are compared by, the main one first: in test where that was made, in validation, and the loss.

        Args:
            columns: Of the results.
        """
        every = [self._measure(self.tested), self.validation, TRAIN_LOSS]
        return [measure for measure in every if measure.column in columns]

    def _measure(self, column: str) -> Measure:
        words = column.replace("_", " ").replace("/", " ").split()
        words = [{"val": "validation", "valid": "validation", "acc": "accuracy"}.get(word, word) for word in words]
        share = (100, 1, " %", " points") if self.is_share else ()
        return Measure(column, " ".join(words), self.mode == "min", *share)


TRAIN_LOSS = Measure("train_loss", "training loss", lower_is_better=True)
_VAL_LOSS = Measure("val_loss", "validation loss", lower_is_better=True)
