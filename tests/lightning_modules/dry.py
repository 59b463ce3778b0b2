"""Commands that stop where their work would begin, and what a stranger's file would execute."""

from __future__ import annotations

from functools import wraps
from typing import Any

import pytest
import pytorch_lightning as pl

from lightning_modules.study import compare
from nsgd.trajectory.escape import walkers

PLANTED = "planted"  # the file that is there if something of the input was executed
UNSAFE = f"!!python/object/apply:os.system ['touch {PLANTED}']"


class Stopped(BaseException):
    """A command got past its checks, and would begin its work."""


def _stop(*_: Any, **__: Any) -> None:
    raise Stopped


def stop_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands raise ``Stopped`` before their first step, walker or worker."""
    for name in ("rehearse_method", "steps_of", "serve"):
        monkeypatch.setattr(compare, name, _stop)
    for name in ("escape", "stay"):
        monkeypatch.setattr(walkers, name, _stop)
    for name in ("fit", "validate", "test", "predict"):
        trains = getattr(pl.Trainer, name)  # whose signature has options of the command

        @wraps(trains)
        def stop(self: pl.Trainer, model: pl.LightningModule, *_: Any, **__: Any) -> None:
            model.configure_optimizers()
            raise Stopped

        monkeypatch.setattr(pl.Trainer, name, stop)
