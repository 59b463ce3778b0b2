"""The file of nsgd predict: what it holds, and that it is there whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules.callbacks.predictions import WritePredictions
from lightning_modules.support.files import read_csv

BATCHES = [torch.tensor([[0.25, 0.75], [0.5, 0.5]]), torch.tensor([[1 / 3, 2 / 3]])]


def write(path: Path) -> None:
    callback = WritePredictions(str(path))
    trainer: Any = None  # it is not asked
    callback.on_predict_start(trainer, trainer)
    for i, batch in enumerate(BATCHES):
        callback.on_predict_batch_end(trainer, trainer, batch, None, i)
    callback.on_predict_end(trainer, trainer)


def test_a_row_has_the_likeliest_class_and_all_probabilities(tmp_path):
    write(tmp_path / "below" / "é.csv")
    assert read_csv(tmp_path / "below" / "é.csv") == [
        {"index": 0, "class": 1, "p_0": 0.25, "p_1": 0.75},
        {"index": 1, "class": 0, "p_0": 0.5, "p_1": 0.5},
        {"index": 2, "class": 1, "p_0": 0.333333, "p_1": 0.666667},
    ]


def test_another_file_has_the_batches_as_they_are(tmp_path):
    write(tmp_path / "all.pt")
    found = torch.load(tmp_path / "all.pt", weights_only=True)
    assert all(map(torch.equal, found, BATCHES))
    assert len(found) == 2


@pytest.mark.parametrize("name", ["all.csv", "all.pt"])
def test_a_full_disk_leaves_no_part_of_it(tmp_path, monkeypatch, name):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write(tmp_path / name)
    assert caught.value.filename == str(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
