"""The augmentation of training data as an option of a study."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
from studies import finished, silent, study

from lightning_modules import Characters, Digits
from lightning_modules.study.compare import run_study
from lightning_modules.support.files import read_csv

ONE = {"methods": ["sgd"], "seeds": 1, "epochs": 1}


def losses(folder):
    return [row["loss"] for row in read_csv(folder / "runs" / "sgd-0" / "metrics.csv")]


def digits(*, augment: bool) -> Digits:
    return Digits(batch_size=50, limit=300, augment=augment)


@pytest.mark.parametrize("value", [True, False])
def test_augment_is_the_datas_own_option(tmp_path, value):
    data = digits(augment=not value)
    changed = losses(finished(tmp_path / "study", data=data, augment=value, **ONE))
    assert changed == losses(finished(tmp_path / "data", data=digits(augment=value), **ONE))
    assert changed != losses(finished(tmp_path / "null", data=digits(augment=not value), **ONE))
    assert data.augment is not value  # a run has a copy


class Method(pl.LightningDataModule):
    def augment(self) -> None:
        """No option."""


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (Characters(), "Characters, which has none"),
        (Method(), "Method, which has none"),
        (None, "none, for the module has loaders of its own"),
    ],
)
def test_data_without_augmentation_are_refused(tmp_path, data, got):
    message = f"^expected data with an option augment for augment True, got {got}; leave augment out$"
    with pytest.raises(ValueError, match=message):
        run_study(study(data=data, augment=True, **ONE), tmp_path / "out", silent)
    assert list(tmp_path.iterdir()) == []
