"""The quadratic model of a loss around a point, against SGD itself, simulated many times on the noisy quadratic."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_modules.callbacks.measurements.local_model import fit_model, without
from nsgd.trajectory.averaging import ema_weights, swa_weights, two_point_weights

# Two sharp directions, and a rest of one curvature: what the model assumes.
CURVATURES = np.array([5.0, 2.0, 0.3, 0.3, 0.3, 0.3])
GRADIENT = np.array([1.0, -0.5, 0.3, 0.0, 0.2, -0.4])
SCATTER = np.array([2.0, 0.5, 1.0, 0.2, 0.7, 0.1])  # of a batch's gradient, its standard deviation
STEPS, LR, RUNS = 12, 0.15, 20_000
AVERAGES = {
    "last": ema_weights(STEPS, decay=0.0),
    "EMA": ema_weights(STEPS, decay=0.7),
    "two points": two_point_weights(STEPS, spacing=6),
    "whole run": swa_weights(STEPS, window=STEPS + 1),
}


def model_of(gradient, count):
    rng = np.random.default_rng(0)
    batches = torch.from_numpy(GRADIENT + SCATTER * rng.standard_normal((count, 6)))
    curvatures = torch.tensor([5.0, 2.0, 0.3], dtype=torch.float64)
    basis = torch.eye(6, dtype=torch.float64)[:2]
    return fit_model(
        1.5, basis=basis, curvatures=curvatures, gradient=torch.from_numpy(gradient), gradients=iter(batches)
    )


@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("shift", [0.0, 0.4])  # the loss that is measured may be on other samples, of another slope
def test_the_expected_loss_of_an_average_is_that_of_many_runs(name, shift):
    slope = GRADIENT + shift
    rng, weights = np.random.default_rng(1), AVERAGES[name].numpy()
    theta = np.zeros((RUNS, 6))
    average = weights[0] * theta
    for weight in weights[1:]:
        theta = theta - LR * (GRADIENT + CURVATURES * theta + SCATTER * rng.standard_normal((RUNS, 6)))
        average += weight * theta
    losses = 1.5 + average @ slope + (CURVATURES * average**2).sum(1) / 2
    error = losses.std() / np.sqrt(RUNS)
    found = model_of(slope, 100_000).expected_loss(AVERAGES[name], lr=LR)
    assert abs(found - 1.5) > 20 * error  # so that the test can tell
    # Five standard errors of the simulation, and those of moments from 100,000 batches: 1 % at most.
    assert found == pytest.approx(losses.mean(), abs=5 * error + 0.01 * abs(losses.mean() - 1.5))


def test_squares_of_the_mean_gradient_are_without_the_noise_of_few_batches():
    """Over many sets of three batches the mean is right; without the correction it is SCATTER^2 / 3 too large."""
    rng, found = np.random.default_rng(2), []
    basis = torch.eye(6, dtype=torch.float64)[:2]
    for _ in range(3000):
        batches = torch.from_numpy(GRADIENT + SCATTER * rng.standard_normal((3, 6)))
        model = fit_model(
            0.0, basis=basis, curvatures=torch.ones(3).double(), gradient=batches[0], gradients=iter(batches)
        )
        found.append(torch.stack([model.squares, model.noise]).numpy())
    mean, error = np.mean(found, 0), np.std(found, 0) / np.sqrt(3000)
    expected = [[x[0], x[1], x[2:].sum()] for x in (GRADIENT**2, SCATTER**2)]
    assert np.all(np.abs(mean - expected) < 5 * error)
    assert np.all(5 * error[0] < np.array(expected[1]) / 3)  # the correction is seen


def test_without_takes_a_basis_out():
    basis = torch.linalg.qr(torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()).Q.T
    vector = torch.arange(5.0).double()
    rest = without(basis, vector)
    assert float((basis @ rest).abs().max()) < 1e-12
    assert float((rest - vector) @ rest) == pytest.approx(0, abs=1e-12)
