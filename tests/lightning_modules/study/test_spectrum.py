"""Curvature and distance where runs ended and were best: the columns of the 2019 paper's table."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import yaml
from studies import finished, plain_start, plain_steps, study
from torch import nn

from lightning_modules import Classifier
from lightning_modules.report.study.files import read_folder
from lightning_modules.report.study.spectrum import spectrum_tables
from lightning_modules.study.compare import run_study
from lightning_modules.study.runs import evaluate
from lightning_modules.study.spectrum import Spectrum, spectrum_columns
from lightning_modules.support.files import read_csv


def test_the_norm_is_that_of_the_dense_hessian_over_the_samples_asked_for():
    """In evaluation mode, of the mean over samples, whatever the batches are."""
    torch.manual_seed(0)
    module = Classifier("mlp", (1, 3, 3), 4, sizes={"hidden": [5]}).double().eval()
    x, y = torch.randn(6, 1, 3, 3).double(), torch.randint(4, (6,))
    start = [p.detach() + 0.1 for p in module.parameters()]
    batches = [((x[:4], y[:4]), 4), ((x[4:], y[4:]), 2)]
    columns = spectrum_columns(Spectrum(k=3, samples=6), module, batches, start)

    shapes = [p.shape for p in module.parameters()]
    flat = torch.cat([p.detach().flatten() for p in module.parameters()])

    def loss(theta: torch.Tensor) -> torch.Tensor:
        parts = [part.view(shape) for part, shape in zip(theta.split([s.numel() for s in shapes]), shapes, strict=True)]
        named = dict(zip([n for n, _ in module.net.named_parameters()], parts, strict=True))
        return nn.functional.cross_entropy(torch.func.functional_call(module.net, named, x), y)

    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))
    largest = values[values.abs().argsort(descending=True)[:3]]
    assert columns["frobenius"] == pytest.approx(float(largest.square().sum().sqrt()), rel=1e-5)
    assert columns["lambda_1"] == pytest.approx(float(values.max()), rel=1e-5)
    assert columns["distance"] == pytest.approx(0.1 * math.sqrt(len(flat)), rel=1e-9)


def test_a_run_that_counts_measures_its_last_weights_and_its_best(tmp_path, monkeypatch):
    counted: list[int] = []

    def counting(spectrum: Spectrum, module: Any, samples: Any, start: Any) -> dict[str, float]:
        counted.append(sum(len(batch[1]) for batch, size in samples))
        return spectrum_columns(spectrum, module, samples, start)

    monkeypatch.setattr(evaluate, "spectrum_columns", counting)
    options = {"methods": ["sgd"], "lr": 0.5, "epochs": 4, "tune": 0, "sweep": "lr", "sweep_points": 2}
    plain = finished(tmp_path / "plain", **options)
    folder = finished(tmp_path / "out", **options, spectrum=Spectrum(k=4, samples=100))
    rows = {(row["seed"], row["read_out"]): row for row in read_csv(folder / "results.csv")}
    for seed in range(2):
        steps = read_csv(folder / "runs" / f"sgd-{seed}" / "metrics.csv")
        validated = [row["val_accuracy"] for row in steps if "val_accuracy" in row]
        assert len(validated) == 4
        assert rows[seed, "best"]["val_accuracy"] == pytest.approx(max(validated))
        assert rows[seed, "last"]["val_accuracy"] == pytest.approx(validated[-1])
        assert rows[seed, "best"]["frobenius"] >= rows[seed, "best"]["lambda_1"] > 0
    net, data = plain_start(0)
    start = [p.detach().clone() for p in net.parameters()]
    list(plain_steps(net, data, torch.optim.SGD(net.parameters(), lr=0.5), steps=16))
    moved = sum(float((p.detach() - s).square().sum()) for p, s in zip(net.parameters(), start, strict=True)) ** 0.5
    assert set(counted) == {100}  # samples, of the 240 there are, in each measurement
    assert rows[0, "last"]["distance"] == pytest.approx(moved, rel=1e-5)
    # Training, and what else is written, are as without; the sweep measures nothing.
    for seed in range(2):
        both = [read_csv(f / "runs" / f"sgd-{seed}" / "metrics.csv") for f in (plain, folder)]
        assert [row["loss"] for row in both[0]] == [row["loss"] for row in both[1]]
    assert "frobenius" not in read_csv(folder / "sweep.csv")[0]
    assert yaml.safe_load((folder / "config.yaml").read_text())["spectrum"] == {"k": 4, "samples": 100}
    (table,) = spectrum_tables(read_folder(folder))
    mean = (rows[0, "best"]["frobenius"] + rows[1, "best"]["frobenius"]) / 2
    assert table["rows"][0][:2] == ["SGD", "best epoch"]
    assert table["rows"][0][2].startswith(f"{mean:.4g} ± ")
    assert spectrum_tables(read_folder(plain)) == []


@pytest.mark.parametrize("wrong", [{"k": 0}, {"samples": 0}, {"k": 2.5}, {"samples": True}])
def test_numbers_that_measure_nothing_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"expected spectrum\.\w+ to be a whole number of at least 1, got"):
        run_study(study(spectrum=Spectrum(**wrong)), tmp_path / "out", lambda *_: None)
    assert not (tmp_path / "out").exists()
