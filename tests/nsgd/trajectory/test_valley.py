"""What is predicted from slope and curvature is what is measured on a quadratic."""

from __future__ import annotations

import math

import pytest
import torch

from nsgd.trajectory.valley import cosine, floor_barriers, predicted_height, predicted_position, segment

ALPHAS = torch.linspace(0, 1, 11, dtype=torch.float64)


def steps(momentum, damped, count=12, lr=0.11):
    """Losses along steps of noisy SGD on a quadratic, with slope and curvature of each."""
    generator = torch.Generator().manual_seed(0)
    hessian = torch.diag(torch.tensor([16.0, 4.0, 1.0, 0.1], dtype=torch.float64))
    theta, velocity = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for _ in range(count):
        gradient = hessian @ theta
        velocity = momentum * velocity + gradient + torch.randn(4, generator=generator, dtype=torch.float64)
        move = -lr * velocity
        if damped:
            move[0] *= 0.1
        points = theta + ALPHAS[:, None] * move
        yield 3 + 0.5 * ((points @ hessian) * points).sum(1), float(gradient @ move), float(move @ hessian @ move)
        theta = theta + move


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("damped", [False, True])
def test_floor_and_height_are_predicted_exactly_on_a_quadratic(momentum, damped):
    outside = 0
    for losses, slope, curvature in steps(momentum, damped):
        found = segment(ALPHAS, losses)
        best = predicted_position(slope, curvature)
        assert found.position == pytest.approx(best, abs=1e-8)
        assert found.floor == pytest.approx(float(losses[0]) - curvature * best**2 / 2, abs=1e-8)
        assert found.height == pytest.approx(predicted_height(slope, curvature), abs=1e-8)
        assert found.grid_floor == float(losses[1:-1].min())
        assert abs(found.grid_position - min(max(best, 0.1), 0.9)) <= 0.05 + 1e-9
        assert found.barrier == 0
        outside += not 0 <= best <= 1
    assert outside < 12


def test_the_height_of_a_floor_in_the_middle_is_an_eighth_of_the_curvature():
    assert predicted_height(-2.0, 4.0) == pytest.approx(4.0 / 8)


@pytest.mark.parametrize("curvature", [0.0, -1.0])
def test_without_curvature_nothing_is_predicted(curvature):
    assert math.isnan(predicted_position(-1.0, curvature))
    assert math.isnan(predicted_height(-1.0, curvature))


def test_a_barrier_is_a_point_above_both_ends():
    losses = torch.tensor([1.0, 0.7, 1.9, 0.8, 1.2])
    found = segment(torch.linspace(0, 1, 5), losses)
    assert found.barrier == pytest.approx(0.7)
    assert (found.grid_position, found.grid_floor) == (0.25, pytest.approx(0.7))
    assert segment(torch.linspace(0, 1, 5), losses.flip(0)).barrier == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("floors", "expected"),
    [
        ([5, 4, 3], []),
        ([3, 4, 5], []),  # it may still rise
        ([5, 3, 4, 6, 5, 7, 4], [3, 2]),
        ([3, 4, 4, 3], [1]),
        ([2], []),
        ([4, 4, 4], []),
    ],
)
def test_barriers_along_the_floor_are_its_rises_before_a_fall(floors, expected):
    assert floor_barriers(torch.tensor(floors, dtype=torch.float64)).tolist() == expected


def test_the_cosine_of_two_vectors():
    one, other = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0.0, 3.0, -4.0])
    assert cosine(one, other) == pytest.approx(-2 / 15)
    assert cosine(one, -one) == pytest.approx(-1)
    assert math.isnan(cosine(one, torch.zeros(3)))


@pytest.mark.parametrize("alphas", [[0.0, 1.0], [0.0, 0.5, 0.9], [0.0, 0.6, 0.4, 1.0]])
def test_alphas_that_do_not_span_the_step_are_refused(alphas):
    with pytest.raises(ValueError, match="ascending from 0 to 1, three or more"):
        segment(torch.tensor(alphas), torch.ones(len(alphas)))
