"""WritePredictions: the class probabilities of ``nsgd predict`` as a file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor


class WritePredictions(pl.Callback):
    """Write one row for each predicted image: its index, the likeliest class and the probability of every class.

    Args:
        path: The CSV file; an existing one is not overwritten.

    Raises:
        ValueError: When prediction starts, if the file exists.
    """

    def __init__(self, path: str = "predictions.csv") -> None:
        self.path = Path(path)
        self._batches: list[Tensor] = []  # (B, classes) each

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that nothing would be overwritten."""
        if self.path.exists():
            raise ValueError(f"{self.path} exists; give another file, for example --predictions.path other.csv")

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Keep a batch."""
        self._batches.append(outputs.cpu())

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        probabilities = torch.cat(self._batches)  # (N, classes)
        self._batches.clear()
        with self.path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["index", "class", *(f"p_{i}" for i in range(probabilities.shape[1]))])
            for i, row in enumerate(probabilities):
                writer.writerow([i, int(row.argmax()), *(f"{p:.6g}" for p in row.tolist())])
