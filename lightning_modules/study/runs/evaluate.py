"""What the weights of a run are worth, in each read-out: by the module's own validation and test, and training loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch

from lightning_modules.callbacks.averages import ReadOuts, calibration_batches
from lightning_modules.data.training_samples import in_batches, training_samples
from lightning_modules.models.base import Split
from lightning_modules.models.batch_loss import batch_losses
from lightning_modules.study.spectrum import Spectrum, spectrum_columns
from lightning_modules.support.quiet import quiet
from lightning_modules.support.score import EVALUATED, Score

_CALIBRATION = 2000  # training samples that BatchNorm statistics are recalibrated on
_BATCH = 500

Scores = dict[str, float]


def score_read_outs(
    trainer: pl.Trainer,
    read_outs: ReadOuts,
    wanted: Sequence[str],
    *,
    judge: Callable[..., pl.Trainer],
    score: Score,
    stages: Sequence[Split],
    test_batches: int | None = None,
    spectrum: Spectrum | None = None,
) -> Iterator[tuple[str, Scores]]:
    """Scores of each wanted read-out of a run that has ended.

    Args:
        trainer: The run's.
        read_outs: What was gathered along it.
        wanted: Read-outs.
        judge: Makes a trainer that validates or tests, from its limits.
        score: What is compared.
        stages: "val", "test", or both.
        test_batches: Batches of the test data, at most; None for all.
        spectrum: What to measure of the Hessian in the last weights and in the best; None for nothing.

    Yields:
        A read-out, and its training loss on the same samples for all, without dropout or augmentation, and scores.
    """
    module: pl.LightningModule = trainer.lightning_module
    data = getattr(trainer, "datamodule", None)
    found, device = module.device, trainer.strategy.root_device
    module.to(device)  # from the CPU, where Lightning leaves it after every fit, validation and test
    otherwise = "give the study a data set with a length"

    def drawn(count: int) -> list[tuple[Any, int]]:
        return training_samples(trainer, module, count, seed=0, parts=in_batches(_BATCH), otherwise=otherwise)

    samples = drawn(EVALUATED)
    curved = [] if spectrum is None else drawn(spectrum.samples)
    calibration = calibration_batches(trainer, module, _CALIBRATION, otherwise=otherwise)
    for name in wanted:
        module.to(device)
        with read_outs.applied(name, module, calibration):
            scores = {"train_loss": _mean_loss(module, samples)}
            if spectrum is not None and name in ("last", "best"):
                scores |= spectrum_columns(spectrum, module, curved, read_outs.start)
            for stage in stages:
                limits = {} if test_batches is None or stage == "val" else {"limit_test_batches": test_batches}
                scores |= wanted_scores(logged_scores(judge(**limits), module, data, stage), stage, score)
        yield name, scores
    module.to(found)


def logged_scores(
    judge: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule | None, stage: Split
) -> Scores:
    """All that a module logs in "val" or in "test", by name; its trainer is the one that it had afterwards."""
    had = module._trainer
    try:
        with quiet():
            evaluate = judge.validate if stage == "val" else judge.test
            evaluate(module, datamodule=data, verbose=False)
    finally:
        module.trainer = had
        if data is not None:
            data.trainer = had
    return {name: float(value) for name, value in judge.callback_metrics.items()}


def wanted_scores(logged: Mapping[str, float], stage: Split, score: Score) -> Scores:
    """The loss and the score of a stage among what was logged there, under their names in results; what there is."""
    if stage == "val":
        return {name: logged[name] for name in score.validated if name in logged}
    tested = next((logged[name] for name in score.as_logged_in_a_test if name in logged), None)
    loss = {"test_loss": logged["test_loss"]} if "test_loss" in logged else {}
    return loss if tested is None else {**loss, score.tested: tested}


def _mean_loss(module: pl.LightningModule, samples: Sequence[tuple[Any, int]]) -> float:
    with batch_losses(module) as loss, torch.no_grad():
        total = sum(float(loss(batch, i)) * count for i, (batch, count) in enumerate(samples))
    return total / sum(count for _, count in samples)
