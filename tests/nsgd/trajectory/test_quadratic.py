"""A batch's loss along its gradient against the loss itself, in the model of a minimum that moves."""

from __future__ import annotations

import math

import pytest
import torch

from nsgd.curvature.hessian import loss_hessian
from nsgd.trajectory.averaging import stationary_variance
from nsgd.trajectory.line import losses_along, vertex
from nsgd.trajectory.quadratic import OwnBatch, held_out_loss, held_out_rate, r_squared

RATES = torch.linspace(0, 0.5, 21, dtype=torch.float64)


def batch_of(weight, loss):
    with loss_hessian(loss, [weight]) as hessian:
        gradient = hessian.gradient
        curvature = float(gradient @ hessian.hvp(gradient))
    return gradient, OwnBatch(loss().item(), float(gradient @ gradient), curvature)


def test_every_prediction_holds_on_a_quadratic():
    generator = torch.Generator().manual_seed(0)
    root, minimum = (torch.randn(5, n, generator=generator, dtype=torch.float64) for n in (5, 1))
    weight = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))

    def loss():
        z = weight - minimum[:, 0]
        return 0.7 + 0.5 * (root.T @ z).square().sum()

    gradient, batch = batch_of(weight, loss)
    measured = losses_along(loss, [weight], -gradient, RATES.tolist())
    torch.testing.assert_close(batch.predicted(RATES), measured, rtol=1e-10, atol=1e-8)
    assert r_squared(measured, batch.predicted(RATES)) == pytest.approx(1, abs=1e-10)
    position, value = vertex(RATES, measured)
    assert batch.best_rate == pytest.approx(position, abs=1e-8)
    assert batch.best_loss == pytest.approx(value, abs=1e-8)
    assert batch.best_rate == pytest.approx(1 / batch.sharpness)


def test_r_squared_tells_a_poor_prediction():
    x = torch.linspace(0, 1, 11)
    assert r_squared(x, x) == 1
    assert r_squared(x, x.mean().expand(11)) == pytest.approx(0)
    assert r_squared(x, 1 - x) == pytest.approx(-3)
    assert math.isnan(r_squared(torch.ones(3), torch.ones(3)))


@pytest.mark.parametrize("curvature", [0.0, -2.0])
def test_without_curvature_there_is_no_best_step(curvature):
    batch = OwnBatch(1.0, 2.0, curvature)
    assert (batch.best_rate, batch.best_loss) == (math.inf, -math.inf)
    assert math.isnan(OwnBatch(1.0, 0.0, 0.0).sharpness)


@pytest.mark.parametrize("h", [0.3, 2.0, 9.0])
@pytest.mark.parametrize("variance", [0.01, 1.0, 30.0])
def test_the_best_rate_for_a_held_out_batch_is_that_of_its_curve(h, variance):
    options = {"curvature": h, "variance": variance, "noise": 0.6}
    best = held_out_rate(**options)
    rates = best * torch.linspace(0, 2, 9, dtype=torch.float64)
    losses = held_out_loss(rates, **options)
    assert vertex(rates, losses)[0] == pytest.approx(best, rel=1e-8)
    assert losses[-1] == pytest.approx(losses[0].item(), rel=1e-12)  # break-even at twice that


@pytest.mark.parametrize("h", [0.3, 2.0, 9.0])
def test_at_stationarity_it_is_half_the_rate_for_every_curvature(h):
    lr, noise = 0.2, 1.7
    variance = float(stationary_variance(lr=lr, curvature=h, noise=noise))
    assert held_out_rate(curvature=h, variance=variance, noise=noise) == pytest.approx(lr / 2, rel=1e-12)


def test_the_held_out_loss_is_the_mean_over_iterates_and_batches():
    """By quadrature over normal iterates and minima, exact for a polynomial of degree two."""
    h, z2, s2 = 2.0, 1.5, 0.6
    nodes = torch.tensor([-math.sqrt(3), 0.0, math.sqrt(3)], dtype=torch.float64)
    shares = torch.tensor([1 / 6, 2 / 3, 1 / 6], dtype=torch.float64)
    rates = torch.tensor([0.0, 0.1, 0.4], dtype=torch.float64)
    expected = torch.zeros(3, dtype=torch.float64)
    for z, a in zip(nodes, shares, strict=True):
        for xi, b in zip(nodes, shares, strict=True):
            for other, c in zip(nodes, shares, strict=True):
                theta, own, held_out = z * z2**0.5, xi * s2**0.5, other * s2**0.5
                after = theta - rates * h * (theta - own)
                expected += a * b * c * h / 2 * (after - held_out) ** 2
    found = held_out_loss(rates, curvature=h, variance=z2, noise=s2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
