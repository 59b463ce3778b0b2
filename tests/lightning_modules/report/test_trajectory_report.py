"""Figures of measurements: drawn from the files alone, with captions that follow their numbers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_modules import AveragingExperiment, BatchQuadratic, Classifier, Digits, SharpnessMonitor, ValleyWalk
from lightning_modules.callbacks.measurements import MEASUREMENTS, make_measurements
from lightning_modules.report.measurements.report import measurement_figures, measurements_in, write_measurements
from lightning_modules.support.files import read_csv, write_csv
from nsgd import NSGD


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of 80 steps on digits wrote, every measurement twice or more where it can be."""
    import pytorch_lightning as pl

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("measured")
    pl.seed_everything(0, verbose=False)
    module = Classifier()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.2)
    callbacks = [
        SharpnessMonitor(samples=32, every=30, k=3, products=12, path=folder / "sharpness.csv"),
        ValleyWalk(samples=32, every=40, length=12, points=4, path=folder / "valley.csv"),
        BatchQuadratic(every=15, path=folder / "quadratic.csv"),
        AveragingExperiment(samples=32, steps=8, path=folder / "averaging.csv"),
    ]
    trainer = pl.Trainer(
        max_steps=80,
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="SharpnessMonitor at step")  # of so few samples
        trainer.fit(module, datamodule=Digits())
    return folder


def altered(measured: Path, to: Path, name: str, change: Any) -> str:
    """The caption after changing every row."""
    rows = read_csv(measured / f"{name}.csv")
    write_csv(to / f"{name}.csv", [change(dict(row)) for row in rows])
    return measurement_figures(measurements_in(to))[name][1]


def test_one_page_holds_a_figure_of_each_and_asks_for_nothing_else(measured):
    page = write_measurements(measured, measurements_in(measured), title="A run").read_text()
    assert page.count("<figure>") == len(MEASUREMENTS)
    assert page.count("<svg") >= len(MEASUREMENTS)
    for name in MEASUREMENTS:
        assert (measured / f"{name}.png").read_bytes()[1:4] == b"PNG"
    assert "nan" not in " ".join(caption for _, caption in measurement_figures(measurements_in(measured)).values())


def test_only_what_was_measured_is_drawn(measured, tmp_path):
    (tmp_path / "valley.csv").write_bytes((measured / "valley.csv").read_bytes())
    assert list(measurement_figures(measurements_in(tmp_path))) == ["valley"]
    (tmp_path / "valley.csv").unlink()
    with pytest.raises(ValueError, match=r"expected a file of sharpness, .* with rows for .*, got none"):
        write_measurements(tmp_path, measurements_in(tmp_path), title="")


@pytest.mark.parametrize(
    ("position", "verdict"), [(0.4, " is confirmed by"), (1.7, " is not confirmed by"), (None, " is not resolved by")]
)
def test_the_valleys_caption_follows_the_floors(measured, tmp_path, position, verdict):
    count = 0

    def change(row):
        nonlocal count
        if row["quantity"] == "position":
            count += 1
            row["value"] = position or (0.5 if count % 2 else 1.5)
        return row

    caption = altered(measured, tmp_path, "valley", change)
    assert verdict in caption
    inside = {0.4: "inside 24 of 24", 1.7: "inside 0 of 24", None: "inside 12 of 24"}[position]
    assert inside in caption


@pytest.mark.parametrize(("shift", "verdict"), [(1.0, "is confirmed"), (-9.0, "is not confirmed")])
def test_the_quadratics_caption_follows_the_unseen_losses(measured, tmp_path, shift, verdict):
    def change(row):
        if row["quantity"] == "loss" and row["of"] == "held out" and row["at"] > 0:
            row["value"] += shift
        return row

    assert verdict in altered(measured, tmp_path, "quadratic", change)


def test_one_batch_alone_resolves_nothing(measured, tmp_path):
    rows = [row for row in read_csv(measured / "quadratic.csv") if row["measurement"] == 1]
    write_csv(tmp_path / "quadratic.csv", rows)
    assert "is not resolved" in measurement_figures(measurements_in(tmp_path))["quadratic"][1]


@pytest.mark.parametrize(
    ("change_of", "verdict"), [(lambda i: 1 + i / 9, "is confirmed"), (lambda i: -1 - i / 9, "is not confirmed")]
)
def test_the_sharpest_directions_caption_follows_the_steps(measured, tmp_path, change_of, verdict):
    def change(row):
        if row["quantity"] == "change after a step" and row["of"] == "e1":
            row["value"] = change_of(row["measurement"])
        return row

    assert verdict in altered(measured, tmp_path, "sharpness", change)


@pytest.mark.parametrize(
    ("share", "verdict"), [(0.1, "is confirmed"), (0.7, "is not resolved"), (2.0, "is not confirmed")]
)
def test_the_averages_caption_follows_the_distances(measured, tmp_path, share, verdict):
    def change(row):
        if row["quantity"].startswith("distance of average"):
            row["value"] = share if row["quantity"].endswith("schedule") else 1.0
        return row

    assert verdict in altered(measured, tmp_path, "averaging", change)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_run_that_diverged_is_drawn_all_the_same(measured, tmp_path, value):
    for name in MEASUREMENTS:

        def change(row):
            if row["quantity"] in ("loss", "position", "floor", "height", "change after a step"):
                row["value"] = value
            return row

        assert "is not resolved" in altered(measured, tmp_path, name, change) or name in ("valley", "averaging")


@pytest.mark.parametrize("names", [["valley", "valley"], ["slope"], ["all", "valley"]])
def test_an_unknown_measurement_is_named(names):
    with pytest.raises(ValueError, match=r"different ones of sharpness, valley, quadratic, averaging, or all, got"):
        make_measurements(names)


def test_measurements_of_a_damped_run_show_what_it_feels(tmp_path):
    import pytorch_lightning as pl

    from lightning_modules import RefreshDirections

    pl.seed_everything(0, verbose=False)
    module = Classifier()
    module.configure_optimizers = lambda: NSGD(module.parameters(), lr=0.2, k=4)
    trainer = pl.Trainer(
        max_steps=13,
        max_epochs=-1,
        callbacks=[RefreshDirections(), SharpnessMonitor(samples=32, every=6, path=tmp_path / "sharpness.csv")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="SharpnessMonitor at step")
        trainer.fit(module, datamodule=Digits())
    rows = read_csv(tmp_path / "sharpness.csv")
    felt = {row["step"]: row["value"] for row in rows if row["quantity"] == "felt sharpness"}
    sharpness = {row["step"]: row["value"] for row in rows if row["quantity"] == "eigenvalue" and row["of"] == "e1"}
    assert list(felt) == [6, 12]  # there are no directions before the first step
    assert all(felt[step] < sharpness[step] for step in felt)
    assert "what damped steps feel" in measurement_figures(measurements_in(tmp_path))["sharpness"][1]


def test_a_brief_monitor_has_a_figure_of_its_spectrum(tmp_path):
    rows = [
        {"measurement": n, "step": 10 * n, "quantity": quantity, "of": of, "at": "", "value": value}
        for n in (1, 2)
        for quantity, of, value in (("eigenvalue", "e1", 8.0), ("lr", "", 0.1), ("stability limit", "", 20.0))
    ]
    write_csv(tmp_path / "sharpness.csv", rows)
    figure, words = measurement_figures(measurements_in(tmp_path))["sharpness"]
    assert len(figure.axes) == 1
    assert "0.4 of the limit of stable steps, in the median" in words
