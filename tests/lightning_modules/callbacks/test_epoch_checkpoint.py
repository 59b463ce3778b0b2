"""A run that is interrupted, and goes on from the end of an epoch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from studies import on_a_plateau, silent, study, without_seconds

from lightning_modules import Digits
from lightning_modules.callbacks import epoch_checkpoint
from lightning_modules.study.compare import run_one, run_study
from lightning_modules.study.methods import Schedule
from lightning_modules.study.options import Study
from lightning_modules.study.runs.subject import Subject
from lightning_modules.study.spectrum import Spectrum
from lightning_modules.support.files import read_csv

METHODS: list[Any] = [
    "nsgd",
    {"like": "nsgd-momentum", "nsgd": {"solver": "auto"}, "label": "Differences"},
    {"like": "nsgd", "nsgd": {"source": "train"}, "label": "Train"},
    "damped-adamw",
    "sam",
    "soap",
    "schedule-free",
]


class StoppedError(BaseException):
    """As a signal ends a process."""


def stopping(study: Study, folder: Any, number: int, at: int) -> None:
    """Make a run, and end it after so many steps."""

    def progress(name: str, step: int, steps: int, words: str) -> None:
        if step == at:
            raise StoppedError

    with pytest.raises(StoppedError):
        run_one(study, folder, number, progress)


def chosen(**options: Any) -> Study:
    data = Digits(batch_size=50, limit=300, augment=True)  # 4 steps an epoch
    schedule, spectrum = Schedule("cosine", warmup=0.1), Spectrum(k=2, samples=50)
    averages = ["ema-0.5", "swa-0.5", "two-point-9"]  # the last begins before the end of an epoch
    more = {"schedule": schedule, "spectrum": spectrum, "averages": averages}
    return study(**{"data": data, "epochs": 4, "seeds": 1, "lr": 0.05, **more, **options})


def test_a_run_that_goes_on_ends_as_one_that_was_not_interrupted(tmp_path, monkeypatch):
    """Every kind of method, with augmentation, at a step within its third epoch; seconds go on too."""
    monkeypatch.setattr(epoch_checkpoint, "EVERY", 0.0)
    asked = chosen(methods=METHODS)
    run_study(asked, tmp_path / "whole", silent)
    begun: list[Any] = []
    load = epoch_checkpoint.EpochCheckpoint.load_state_dict
    monkeypatch.setattr(
        epoch_checkpoint.EpochCheckpoint, "load_state_dict", lambda self, state: (begun.append(1), load(self, state))
    )
    for number in range(len(METHODS)):
        stopping(asked, tmp_path / "two", number, 10)
        run_one(asked, tmp_path / "two", number, silent)
    assert len(begun) == len(METHODS)
    run_study(asked, tmp_path / "two", silent)
    assert without_seconds(tmp_path / "two") == without_seconds(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_rate_that_fell_stays_low_in_a_run_that_goes_on(tmp_path, monkeypatch):
    """Interrupted after a fall, and within a plateau whose end the validations before count for."""
    monkeypatch.setattr(epoch_checkpoint, "EVERY", 0.0)
    schedule = Schedule("plateau", patience=2)
    asked = chosen(methods=["sgd", "sam"], schedule=schedule, lr=2.0, epochs=8)
    run_study(asked, tmp_path / "whole", silent)
    steps = read_csv(tmp_path / "whole" / "runs" / "sgd-0" / "metrics.csv")
    factors = on_a_plateau([row["val_loss"] for row in steps if "val_loss" in row], 2)
    assert factors[4] < 1
    assert factors[5] > factors[6]
    for number in range(2):
        stopping(asked, tmp_path / "two", number, 26)  # after six validations
        run_one(asked, tmp_path / "two", number, silent)
    run_study(asked, tmp_path / "two", silent)
    assert without_seconds(tmp_path / "two") == without_seconds(tmp_path / "whole")


def test_a_short_run_keeps_no_checkpoint_and_begins_anew(tmp_path):
    stopping(chosen(methods=["sgd"]), tmp_path, 0, 10)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_seconds_of_a_run_that_goes_on_are_counted_on(tmp_path, monkeypatch):
    monkeypatch.setattr(epoch_checkpoint, "EVERY", 0.0)
    asked = chosen(methods=["sgd"])
    stopping(asked, tmp_path, 0, 10)
    path = tmp_path / "runs" / "sgd-0" / "checkpoint.ckpt"
    held = torch.load(path, weights_only=True)
    key = next(key for key in held["callbacks"] if key.startswith("RecordSteps"))
    held["callbacks"][key]["rows"][-1]["seconds"] = 1000.0
    torch.save(held, path)
    run_one(asked, tmp_path, 0, silent)
    seconds = [row["seconds"] for row in read_csv(path.with_name("metrics.csv"))]
    assert len(seconds) == 16
    assert seconds[7] == 1000.0
    assert all(1000 < s < 1060 for s in seconds[8:])


def test_a_checkpoint_of_other_settings_is_passed_over_and_a_foreign_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(epoch_checkpoint, "EVERY", 0.0)
    asked = chosen(methods=["sgd"])
    stopping(asked, tmp_path / "one", 0, 10)
    other = replace(asked, lr=0.2)
    run_study(other, tmp_path / "whole", silent)
    stopping(other, tmp_path / "two", 0, 2)
    taken = tmp_path / "two" / "runs" / "sgd-0" / "checkpoint.ckpt"
    taken.write_bytes((tmp_path / "one" / "runs" / "sgd-0" / "checkpoint.ckpt").read_bytes())
    run_study(other, tmp_path / "two", silent)
    assert without_seconds(tmp_path / "two") == without_seconds(tmp_path / "whole")
    stopping(asked, tmp_path / "three", 0, 2)
    cut = tmp_path / "three" / "runs" / "sgd-0" / "checkpoint.ckpt"
    cut.write_bytes(taken.read_bytes()[:500] if taken.exists() else b"PK cut")
    with pytest.raises(ValueError, match=f"expected a checkpoint in {cut}, got a file that cannot be read"):
        run_one(asked, tmp_path / "three", 0, silent)


def test_modules_and_data_of_others_keep_no_checkpoint():
    """Their order of batches, and what they keep in attributes, is not known."""
    assert Subject(chosen()).goes_on
    assert not Subject(replace(chosen(), model={"class_path": "Classifier"})).goes_on
    assert not Subject(replace(chosen(), data=None)).goes_on
