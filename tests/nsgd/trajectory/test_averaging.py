"""Averages against SGD itself, run on quadratics with the same batches, and against the closed forms of the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from nsgd.trajectory.averaging import (
    average_moments,
    ema_weights,
    equivalent_schedule,
    squared_distance,
    stationary_variance,
    swa_weights,
    tail_sums,
    two_point_loss,
    two_point_weights,
    variance_ratio,
)

STEPS, LR = 40, 0.1
CURVATURES = torch.tensor(
    [0.0, 1e-6, 0.3, 2.0, 7.0, 9.5, 12.0, 19.0, 10.0], dtype=torch.float64
)  # lr h up to 1.9, and 1
AVERAGES = {
    "last": ema_weights(STEPS, decay=0.0),
    "ema": ema_weights(STEPS, decay=0.9),
    "swa": swa_weights(STEPS, window=15),
    "all": swa_weights(STEPS, window=STEPS + 1),
    "two points": two_point_weights(STEPS, spacing=12),
    "arbitrary": torch.rand(STEPS + 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64).softmax(0),
}


def run(rates, minima, start=1.3):
    """Iterates (T + 1, m) of SGD on h (theta - xi)^2 / 2, each column a curvature; rates (m, T), minima (T,)."""
    theta = torch.full_like(CURVATURES, start)
    found = [theta]
    for t, xi in enumerate(minima):
        theta = theta - rates[:, t] * CURVATURES * (theta - xi)
        found.append(theta)
    return torch.stack(found)


@pytest.fixture
def minima():
    return torch.randn(STEPS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("weights", AVERAGES.values(), ids=AVERAGES)
def test_an_average_is_the_last_iterate_under_its_schedule(weights, minima):
    constant = torch.full((len(CURVATURES), STEPS), LR, dtype=torch.float64)
    average = weights @ run(constant, minima)
    schedule = equivalent_schedule(weights, lr=LR, curvature=CURVATURES)
    assert schedule.shape == constant.shape
    assert_close(run(schedule, minima)[-1], average, rtol=0, atol=1e-10)
    one = equivalent_schedule(weights, lr=LR, curvature=7.0)
    assert_close(one, schedule[4], rtol=0, atol=0)


@pytest.mark.parametrize("weights", AVERAGES.values(), ids=AVERAGES)
def test_tail_sums_are_the_shares_of_the_recorded_gradients(weights, minima):
    thetas = run(torch.full((len(CURVATURES), STEPS), LR, dtype=torch.float64), minima)
    gradients = CURVATURES * (thetas[:-1] - minima[:, None])
    assert_close(thetas[0] - LR * tail_sums(weights) @ gradients, weights @ thetas, rtol=0, atol=1e-12)


@pytest.mark.parametrize("weights", AVERAGES.values(), ids=AVERAGES)
def test_an_average_has_the_moments_that_sgd_gives_it(weights):
    """The run is linear in the start's gradient and in each batch's noise: one run for each, by the update rule."""
    steps = len(weights) - 1
    for h in CURVATURES.tolist():
        pushes = np.vstack([np.ones(steps), np.eye(steps)])  # the constant gradient, then the noise of each step alone
        theta = np.zeros(len(pushes))
        average = float(weights[0]) * theta
        for push, weight in zip(pushes.T, weights[1:].tolist(), strict=True):
            theta = theta - LR * (h * theta + push)
            average += weight * theta
        drift, spread = average_moments(weights, lr=LR, curvature=h)
        # Powers up to 0.9^40 and sums of 40 terms, each way in float64.
        assert float(drift) == pytest.approx(-average[0], rel=1e-9, abs=1e-12)
        assert float(spread) == pytest.approx(float(np.sum(average[1:] ** 2)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("h", [2.0, 12.0])
def test_moments_in_the_long_run_are_the_stationary_ones(h):
    weights = ema_weights(600, decay=0.9)
    drift, spread = average_moments(weights, lr=LR, curvature=h)
    assert float(drift) == pytest.approx(1 / h, rel=1e-9)  # the minimum lies at -g / h
    expected = stationary_variance(lr=LR, curvature=h, noise=1 / h**2) * variance_ratio(weights, lr=LR, curvature=h)
    assert float(spread) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("weights", AVERAGES.values(), ids=AVERAGES)
def test_flat_directions_have_the_schedule_of_the_tail_sums(weights):
    for curvature, tolerance in ((0.0, 1e-15), (1e-9, 1e-6)):
        schedule = equivalent_schedule(weights, lr=LR, curvature=curvature)
        assert_close(schedule, LR * tail_sums(weights), rtol=0, atol=tolerance)


def to_the_end():
    return torch.arange(STEPS, 0, -1, dtype=torch.float64)


@pytest.mark.parametrize("h", [0.3, 2.0, 7.0])
def test_the_schedule_of_swa_has_its_closed_form(h):
    window, n, rho = 15, to_the_end(), 1 - LR * h
    expected = (1 / h) * (1 - rho**n) / (window - n + 1 + rho * (1 - rho ** (n - 1)) / (LR * h))
    found = equivalent_schedule(swa_weights(STEPS, window=window), lr=LR, curvature=h)
    assert_close(found[n < window], expected[n < window], rtol=1e-10, atol=0)


@pytest.mark.parametrize("h", [0.3, 2.0, 7.0])
def test_the_schedule_of_the_exponential_average_has_its_closed_form(h):
    decay, steps = 0.9, 400  # so long that its start no longer matters
    n, rho = torch.arange(steps, 0, -1, dtype=torch.float64), 1 - LR * h
    expected = LR * (1 - decay) * (decay**n - rho**n) / (LR * h * decay**n - (1 - decay) * rho**n)
    found = equivalent_schedule(ema_weights(steps, decay=decay), lr=LR, curvature=h)
    assert_close(found[n < 60], expected[n < 60], rtol=1e-8, atol=0)
    assert found[-1] == pytest.approx(LR * (1 - decay))
    cap = LR if LR * h < 1 - decay else (1 - decay) / h  # far from the end
    assert found[steps // 2] == pytest.approx(cap, rel=1e-6)


@pytest.mark.parametrize("h", [0.3, 2.0, 7.0])
def test_the_schedule_of_two_points_has_its_closed_form(h):
    spacing, n, rho = 12, to_the_end(), 1 - LR * h
    expected = torch.where(n <= spacing, LR * rho ** (n - 1) / (1 + rho ** (n - 1)), LR)
    found = equivalent_schedule(two_point_weights(STEPS, spacing=spacing), lr=LR, curvature=h)
    assert_close(found, expected, rtol=1e-10, atol=0)


def covariance(h, steps=600):
    """Of iterates (steps, steps) at stationarity, from the sum over all past minima: theta_t = lr h sum rho^j xi."""
    rho, length = 1 - LR * h, 4000
    powers = LR * h * rho ** torch.arange(length - 1, -1, -1, dtype=torch.float64)
    maps = torch.stack(
        [torch.cat([powers[length - (length - steps + t) :], torch.zeros(steps - t)]) for t in range(steps)]
    )
    return maps @ maps.T


@pytest.mark.parametrize("h", [0.3, 2.0, 12.0])
def test_variances_are_those_of_the_sum_over_all_batches(h):
    iterates = covariance(h)
    last = stationary_variance(lr=LR, curvature=h)
    assert_close(iterates[-1, -1], last, rtol=1e-9, atol=0)
    rho = 1 - LR * h
    for weights, ratio in (
        (ema_weights(599, decay=0.9), (1 - 0.9) * (1 + 0.9 * rho) / ((1 + 0.9) * (1 - 0.9 * rho))),
        (two_point_weights(599, spacing=7), (1 + rho**7) / 2),
        (swa_weights(599, window=50), None),
    ):
        found = variance_ratio(weights, lr=LR, curvature=h)
        assert_close(weights @ iterates @ weights, last * found, rtol=1e-9, atol=0)
        if ratio is not None:
            assert found == pytest.approx(ratio, rel=1e-9)


def test_distances_of_iterates_are_those_of_their_covariance():
    curvatures, noise = torch.tensor([0.3, 2.0, 12.0]).double(), torch.tensor([1.0, 4.0, 0.25]).double()
    spacings = torch.tensor([0, 1, 5, 60])
    found = squared_distance(spacings, lr=LR, curvatures=curvatures, noise=noise)
    for spacing, value in zip(spacings.tolist(), found, strict=True):
        expected = 0.0
        for h, s in zip(curvatures, noise, strict=True):
            c = covariance(float(h))
            expected += s * (c[-1, -1] + c[-1 - spacing, -1 - spacing] - 2 * c[-1, -1 - spacing])
        assert_close(value, expected, rtol=0, atol=1e-9)


def test_an_unstable_rate_has_no_stationary_variance():
    found = stationary_variance(lr=LR, curvature=torch.tensor([10.0, 20.0, 30.0]))
    assert found.tolist() == [1.0, float("inf"), float("inf")]


def test_the_loss_between_two_points_is_exact_on_a_quadratic():
    generator = torch.Generator().manual_seed(1)
    root, a, b = (torch.randn(6, n, generator=generator, dtype=torch.float64) for n in (6, 1, 1))
    hessian = root @ root.T

    def loss(x):
        return (x.T @ hessian @ x / 2 + x.sum()).item()

    found = two_point_loss((loss(a), loss(b)), curvature=((a - b).T @ hessian @ (a - b)).item())
    assert float(found) == pytest.approx(loss((a + b) / 2), rel=1e-10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ema_weights(-1, decay=0.9), "steps to be a whole number of at least 0, got -1"),
        (lambda: ema_weights(5, decay=1.0), r"decay in \[0, 1\), got 1.0"),
        (lambda: swa_weights(5, window=7), "a window of 1 to 6 iterates, all there are after 5 steps, got 7"),
        (lambda: two_point_weights(5, spacing=6), "a spacing of 1 to 5 steps, all there are, got 6"),
        (
            lambda: tail_sums(torch.ones(3)),
            r"weights \(T \+ 1,\) of the iterates with sum 1, got shape \(3,\) and sum 3",
        ),
    ],
)
def test_what_is_out_of_range_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "options", [{"lr": 0.0}, {"lr": -0.1}, {"curvature": -1.0}, {"curvature": 0.0}, {"noise": -1.0}]
)
def test_without_a_stationary_state_there_is_no_variance(options):
    with pytest.raises(ValueError, match="expected lr and curvature above 0 and noise of at least 0"):
        stationary_variance(**{"lr": 0.1, "curvature": 1.0, **options})
    with pytest.raises(ValueError, match="there is no stationary state"):
        squared_distance(2, lr=0.1, curvatures=torch.tensor([1.0, -1.0]))
