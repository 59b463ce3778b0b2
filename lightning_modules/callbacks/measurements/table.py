"""The rows that a measurement writes, and their file."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
from torch import Tensor

from lightning_modules.support.files import Rows, unused, write_csv


class Table:
    """Rows of one CSV file.

    Each has the number of the measurement, the optimizer steps before, a quantity
    (:mod:`lightning_modules.support.quantities`), what it is of, where it is, and its value.

    Args:
        name: Of the file without an ending, where no path is given.
        path: The file; None for one in the folder of the logger, or in ``default_root_dir`` where there is none.

    Attributes:
        rows: So far.
        number: Of the running measurement, from 1.
        file: The one that this run wrote, which has a number in its name where the path was taken; None before.
    """

    def __init__(self, name: str, *, path: str | Path | None) -> None:
        self._name = name
        self.path = None if path is None else Path(path)
        self.rows: Rows = []
        self.number = 0
        self.file: Path | None = None

    def restart(self, step: int) -> None:
        """Take another file for another run, and forget the rows of an earlier one where it begins with step 0."""
        if step == 0:
            self.rows, self.number = [], 0
        self.file = None

    def note(self, step: int, quantity: str, value: float | Tensor, *, of: str = "", at: float | None = None) -> None:
        """Add a row."""
        row = {"measurement": self.number, "step": step, "quantity": quantity, "of": of}
        self.rows.append({**row, "at": "" if at is None else at, "value": float(value)})

    def write(self, trainer: pl.Trainer) -> None:
        """Write the rows so far."""
        if self.file is None:
            self.file = unused(self.path or Path(trainer.log_dir or trainer.default_root_dir) / f"{self._name}.csv")
        if trainer.is_global_zero:
            write_csv(self.file, self.rows)
