"""WritePredictions: the class probabilities of ``nsgd predict`` as a file."""

from __future__ import annotations

import csv
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor

from lightning_modules.support.whole_files import write_text, write_with


class WritePredictions(pl.Callback):
    """Write one row for each predicted sample: its index, the likeliest class and the probability of every class.

    Args:
        path: The CSV file; an existing one is not overwritten. A file that ends in ".pt" takes the list of what
            ``predict_step`` returned for each batch, whatever it is, by ``torch.save``.

    The file is there whole or not at all.

    Raises:
        ValueError: When prediction starts, if the file exists; or if a CSV file is wanted of what is no table.
    """

    def __init__(self, path: str = "predictions.csv") -> None:
        self.path = Path(path)
        self._batches: list[Any] = []  # tensors (B, classes) for a CSV file

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that nothing would be overwritten."""
        if self.path.exists():
            raise ValueError(f"{self.path} exists; give another file, for example --predictions.path other.csv")

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Keep a batch."""
        if self.path.suffix != ".pt" and not (isinstance(outputs, Tensor) and outputs.ndim == 2):
            got = f"a tensor {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
            raise ValueError(
                f"expected predict_step to return a tensor (batch, classes) for {self.path}, got {got}; give "
                "--predictions.path predictions.pt for the outputs as they are"
            )
        self._batches.append(move_data_to_device(outputs, torch.device("cpu")))

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the file."""
        if self.path.suffix == ".pt":
            write_with(self.path, partial(torch.save, self._batches))
            self._batches.clear()
            return
        probabilities = torch.cat(self._batches)  # (N, classes)
        self._batches.clear()
        text = StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(["index", "class", *(f"p_{i}" for i in range(probabilities.shape[1]))])
        for i, row in enumerate(probabilities):
            writer.writerow([i, int(row.argmax()), *(f"{p:.6g}" for p in row.tolist())])
        write_text(self.path, text.getvalue())
