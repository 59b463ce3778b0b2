"""What a study compares: what it is called, which way is better, and which row is the best."""

from __future__ import annotations

import math

import pytest

from lightning_modules.support.score import Score, better, failed_runs


@pytest.mark.parametrize(
    ("monitor", "tested", "label", "share"),
    [
        ("val_accuracy", "test_accuracy", "validation accuracy", True),
        ("valid_acc", "test_acc", "validation accuracy", True),
        ("val/f1", "test/f1", "validation f1", False),
        ("validation_loss", "test_loss", "validation loss", False),
        ("perplexity", "test_perplexity", "perplexity", False),
        ("val_acc_epoch", "test_acc_epoch", "validation accuracy", True),
        ("val_acc/dataloader_idx_0", "test_acc/dataloader_idx_0", "validation accuracy", True),
        ("eval_loss", "test_loss", "validation loss", False),
        ("value_loss", "test_value_loss", "value loss", False),
        ("retrieval_map", "test_retrieval_map", "retrieval map", False),
    ],
)
def test_a_score_is_called_by_what_it_is(monitor, tested, label, share):
    score = Score(monitor, "max")
    assert (score.tested, score.validation.label, score.is_share) == (tested, label, share)
    assert [m.column for m in score.measures([monitor, "train_loss", "x"])] == [monitor, "train_loss"]
    assert [m.column for m in score.measures({tested, monitor, "train_loss"})] == [tested, monitor, "train_loss"]
    assert score.criterion(["val_loss"]).column == "val_loss"
    assert score.criterion([monitor]).column == monitor
    assert score.validation.header == label + (", %" if share else "")


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [("val_acc_epoch", "max"), ("val_auroc", "max"), ("valid/F1", "max"), ("val_loss", "min"), ("eval_rmse", "min")],
)
def test_a_name_tells_what_is_better(monitor, mode):
    assert better(monitor) == mode


def test_a_name_that_does_not_tell_asks_for_the_mode():
    with pytest.raises(ValueError, match="expected --mode min or max with --monitor val_energy"):
        better("val_energy")


@pytest.mark.parametrize("name", ["loss", "train_loss", "lr", "seed", "step"])
def test_a_name_that_the_studys_files_use_is_refused(name):
    with pytest.raises(ValueError, match="logged in validation under a name of its own"):
        Score(name, "min")


def test_the_loss_that_is_monitored_is_also_the_criterion():
    assert not Score("val_loss", "max").criterion(["val_loss"]).lower_is_better
    assert Score("val_acc", "max").criterion(["val_loss", "val_acc"]).lower_is_better


def test_an_accuracy_in_per_cent_is_left_so():
    assert Score("val_acc", "max", shares=False).validation.header == "validation accuracy"


def test_the_best_row_is_the_least_bad():
    rows = [{"val_r2": 0.5}, {"val_r2": 0.9}, {"val_r2": math.nan}, {}]
    assert min(rows, key=Score("val_r2", "max").validation.badness) == {"val_r2": 0.9}
    assert min(rows, key=Score("val_r2", "min").validation.badness) == {"val_r2": 0.5}


def test_a_run_failed_that_died_or_ended_no_better_than_it_began():
    losses = {0: (0.1, 2.3), 1: (2.3, 2.3), 2: (math.nan, 2.3), 3: (math.inf, math.inf), 4: (9.0, math.nan)}
    rows = [
        {"method": "sgd", "seed": seed, "read_out": "last", "train_loss": loss, "start_loss": start}
        for seed, (loss, start) in losses.items()
    ]
    assert failed_runs(rows, ["sgd", "nsgd"], range(6)) == {"sgd": {1, 2, 3, 4, 5}, "nsgd": {*range(6)}}


def test_in_a_study_of_before_a_finite_loss_is_no_failure():
    rows = [{"method": "sgd", "seed": 0, "read_out": "last", "train_loss": 1e9}]
    assert failed_runs(rows, ["sgd"], [0]) == {"sgd": set()}


def test_one_bar_holds_for_all_seeds():
    """A run that began far above chance, 2.3, and ended there, has not learned."""
    rows = [
        {"method": "sgd", "seed": seed, "read_out": "last", "train_loss": loss, "start_loss": start}
        for seed, loss, start in [(0, 0.1, 2.34), (1, 2.35, 3.04), (2, 0.2, math.nan)]
    ]
    assert failed_runs(rows, ["sgd"], range(3)) == {"sgd": {1}}
