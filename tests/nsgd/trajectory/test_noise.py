"""Noise whose variance depends on the position: quadrature and walkers against the exact chain of SGD on a grid."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from nsgd.trajectory.escape import gibbs_mass, passage_time, simulate, temperature
from nsgd.trajectory.escape.landscape import Landscape, built_in_landscape, landscape_between, with_noise
from nsgd.trajectory.escape.potentials import DoubleWell
from nsgd.trajectory.escape.theory import predicted_stay, predicted_steps
from nsgd.trajectory.escape.walkers import escape

WELL = DoubleWell(barrier=1.0, skew=0.3)
SHARP, FLAT = WELL.minima
FLOOR = 0.3


def landscape(follows: str) -> Landscape:
    return with_noise(built_in_landscape("double-well", barrier=1.0, skew=0.3, walls=40.0), follows, floor=FLOOR)


def by_loss(x):
    return FLOOR + (1 - FLOOR) * WELL(x)


def by_curvature(x):
    """By second differences, which the library does not take."""
    step = 1e-4
    second = (WELL(x + step) - 2 * WELL(x) + WELL(x - step)) / step**2
    return FLOOR + (1 - FLOOR) * np.abs(second) / WELL.curvature(SHARP)


SPREADS: dict[str, Callable] = {"loss": by_loss, "curvature": by_curvature}


def kernel_of(follows, grid, lr, heat):
    """Densities of SGD's next position from each point of a grid."""
    means = grid - lr * WELL.gradient(torch.from_numpy(grid)).numpy()
    deviations = np.sqrt(2 * lr * heat * SPREADS[follows](grid))[:, None]
    return np.exp(-0.5 * ((grid[None] - means[:, None]) / deviations) ** 2) / (deviations * math.sqrt(2 * math.pi))


def chain_steps(follows, lr, heat, points=1601):
    """Exact mean steps of SGD from the sharp minimum to the flat one: (I - K) tau = 1 on a grid to its left."""
    grid = np.linspace(-2.8, FLAT, points, endpoint=False)
    kernel = kernel_of(follows, grid, lr, heat) * (grid[1] - grid[0])
    times = np.linalg.solve(np.eye(points) - kernel, np.ones(points))
    return float(np.interp(SHARP, grid, times))


def chain_share(follows, lr, heat, points=1601):
    """Stationary share right of the saddle."""
    grid = np.linspace(-3.0, 5.0, points)
    kernel = kernel_of(follows, grid, lr, heat)
    kernel /= kernel.sum(1, keepdims=True)
    equations = np.vstack((kernel.T - np.eye(points), np.ones(points)))
    shares = np.linalg.lstsq(equations, np.append(np.zeros(points), 1), rcond=None)[0]
    return float(shares[grid > 0].sum())


@pytest.mark.parametrize(("follows", "close"), [("loss", 0.03), ("curvature", 0.12)])
def test_the_quadrature_is_what_exact_chains_tend_to_as_the_rate_falls(follows, close):
    heat = 0.35
    exact = passage_time(WELL, start=SHARP, end=FLAT, far=-6.0, temperature=heat, spread=SPREADS[follows])
    errors = [chain_steps(follows, lr, heat) * lr / exact - 1 for lr in (0.02, 0.01)]
    assert abs(errors[1]) < close
    assert abs(errors[1]) < abs(errors[0])
    masses = gibbs_mass(WELL, edges=np.array([-4.0, 0.0, 8.0]), temperature=heat, spread=SPREADS[follows])
    shares = [abs(chain_share(follows, lr, heat) - float(masses[1])) for lr in (0.02, 0.005)]
    assert shares[1] < 0.01
    assert shares[1] < shares[0] + 1e-3


@pytest.mark.parametrize("follows", ["loss", "curvature"])
def test_walkers_are_the_exact_chain(follows):
    well, lr, heat = landscape(follows), 0.02, 0.7
    batch_size = lr * 1000 / (2 * heat)
    assert temperature(lr=lr, noise=1000.0, batch_size=batch_size) == pytest.approx(heat)
    found = simulate(
        well.gradient,
        torch.full((3000, 1), SHARP),
        lambda x: x[:, 0] >= FLAT,
        lr=lr,
        noise=1000.0,
        batch_size=batch_size,
        steps=30_000,
        spread=well.spread,
    )
    assert found.reached > 0.99
    wanted = chain_steps(follows, lr, heat)
    assert abs(found.mean - wanted) < 4 * found.standard_error + 0.01 * wanted


@pytest.mark.parametrize("follows", ["loss", "curvature"])
def test_the_prediction_to_leading_order_is_the_quadratures_where_barriers_are_high(follows):
    well = landscape(follows)
    cold, colder = ({"lr": 1e-3, "noise": 1000.0, "batch_size": 0.5 / heat} for heat in (0.08, 0.04))
    ratios = [leading / exact for exact, leading in (predicted_steps(well, sgd) for sgd in (cold, colder))]
    assert abs(ratios[1] - 1) < 0.05
    assert abs(ratios[1] - 1) < abs(ratios[0] - 1)
    (exact, leading), _ = predicted_stay(well, colder).values()
    assert exact == pytest.approx(leading, abs=0.01)


def test_noise_decides_which_minimum_wins():
    """With noise that follows the curvature the flat one takes nearly all, and more so the colder it is."""
    sgd = {"lr": 1e-3, "noise": 1000.0, "batch_size": 5.0}
    shares = {name: predicted_stay(landscape(name), sgd)["share"][0] for name in ("constant", "loss", "curvature")}
    assert shares["constant"] == pytest.approx(0.605, abs=0.01)
    assert shares["loss"] == pytest.approx(shares["constant"], abs=0.01)  # minima of one depth
    assert shares["curvature"] > 0.85
    colder = predicted_stay(landscape("curvature"), {**sgd, "batch_size": 20.0})["share"][0]
    assert colder > 0.99


def test_noise_of_any_landscape_follows_its_own_loss_and_curvature():
    def tilted(x):
        return (x[:, 0] ** 2 - 1) ** 2 + 0.1 * x[:, 0]

    own = landscape_between(tilted, torch.tensor([1.0]), torch.tensor([-1.0]))
    points = torch.linspace(-1.4, 1.4, 9, dtype=torch.float64)[:, None]
    loss = with_noise(own, "loss", floor=0.2).spread
    above = (tilted(points) - own.lowest) / own.barrier
    assert loss is not None
    torch.testing.assert_close(loss(points), 0.2 + 0.8 * above.clamp(min=0))
    curved = with_noise(own, "curvature", floor=0.2).spread
    second = 12 * points[:, 0] ** 2 - 4
    at_start = float(12 * own.start[0] ** 2 - 4)
    assert curved is not None
    torch.testing.assert_close(curved(points), 0.2 + 0.8 * second.abs() / at_start, rtol=1e-5, atol=1e-6)
    assert with_noise(own, "constant", floor=0.2) is own


def test_in_two_dimensions_there_is_no_formula_and_walkers_leave_all_the_same():
    channel = with_noise(built_in_landscape("channel", barrier=1.0, skew=0.3, walls=4.0), "loss", floor=0.5)
    sgd = {"lr": 0.02, "noise": 1000.0, "batch_size": 20.0}
    assert all(map(math.isnan, predicted_steps(channel, sgd)))
    assert all(math.isnan(value) for pair in predicted_stay(channel, sgd).values() for value in pair)
    assert escape(channel, sgd, walkers=50, steps=3000, seed=0, update=lambda *_: None)["arrived"] > 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: landscape("size"), "expected follows to be one of constant, loss, curvature, got 'size'"),
        (lambda: with_noise(landscape("constant"), "loss", floor=0.0), "expected a floor above 0 .* got 0"),
        (lambda: with_noise(landscape("constant"), "loss", floor=1.5), "at most 1, got 1.5"),
        (
            lambda: passage_time(WELL, start=SHARP, end=FLAT, far=-4.0, temperature=0.1, spread=lambda x: 0 * x),
            "expected a spread above 0 everywhere",
        ),
        (
            lambda: simulate(
                torch.zeros_like,
                torch.zeros(3, 1),
                lambda x: x[:, 0] > 1,
                lr=0.1,
                noise=1.0,
                batch_size=1.0,
                steps=2,
                spread=lambda x: x,
            ),
            r"expected spread to give 3 factors, got a Tensor of shape \(3, 1\)",
        ),
    ],
)
def test_bad_noise_is_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
