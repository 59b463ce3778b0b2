"""Landscapes are found where closed forms have them, and what is predicted on them is what the diffusion says."""

from __future__ import annotations

import math

import pytest
import torch

from nsgd.trajectory.escape import escape_time, laplace_mass, passage_time, temperature
from nsgd.trajectory.escape.landscape import built_in_landscape, landscape_between
from nsgd.trajectory.escape.potentials import DoubleWell
from nsgd.trajectory.escape.theory import predicted_stay, predicted_steps
from nsgd.trajectory.escape.walkers import escape, stay

WELL = DoubleWell(barrier=1.0, skew=0.3)
SGD = {"lr": 0.02, "noise": 1000.0, "batch_size": 40.0}


def point(*coordinates):
    return torch.tensor(coordinates, dtype=torch.float64)


def turned(points):
    """Two quartic wells along the diagonal, with minima at +-(1, 1), the saddle at 0, and curvature 4 across."""
    along, across = (points[:, 0] + points[:, 1]) / 2, (points[:, 0] - points[:, 1]) / 2
    return (along**2 - 1) ** 2 + 4 * across**2


@pytest.mark.parametrize("saddle", [None, point(0.2, -0.1)])
def test_minima_and_saddle_are_found_near_the_points_that_are_given(saddle):
    found = landscape_between(turned, point(-0.8, -1.3), point(1.2, 0.9), saddle)
    # By Newton's method to 1e-12 on the gradient; curvatures are 8 and 8 along and across, -4 and 8, halved.
    torch.testing.assert_close(found.start, point(-1, -1), atol=1e-8, rtol=0)
    torch.testing.assert_close(found.goal, point(1, 1), atol=1e-8, rtol=0)
    torch.testing.assert_close(found.saddle, point(0, 0), atol=1e-8, rtol=0)
    torch.testing.assert_close(found.curvatures(found.start), point(4, 4), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.curvatures(found.saddle), point(-2, 4), atol=1e-6, rtol=0)
    assert found.barrier == pytest.approx(1, abs=1e-10)
    torch.testing.assert_close(found.way_out, point(1, 1) / math.sqrt(2), atol=1e-6, rtol=0)
    at = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.testing.assert_close(found.gradient(at), torch.autograd.grad(turned(at).sum(), at)[0])


def test_a_well_that_is_given_as_a_function_is_the_built_in_one():
    left, right = WELL.minima
    found = landscape_between(lambda x: WELL(x[:, 0]), point(left - 0.1), point(right + 0.1))
    built_in = built_in_landscape("double-well", barrier=1.0, skew=0.3, walls=40.0)
    for name in ("start", "saddle", "goal"):
        torch.testing.assert_close(getattr(found, name), getattr(built_in, name), atol=1e-8, rtol=0)
    assert found.names == built_in.names == ("sharp", "flat")
    assert found.steepest == pytest.approx(built_in.steepest)
    assert predicted_steps(found, SGD) == pytest.approx(predicted_steps(built_in, SGD), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: landscape_between(turned, point(-1, -1), point(1)),
            r"of one dimension d, got shapes \[\(2,\), \(1,\)",
        ),
        (lambda: landscape_between(turned, point(), point()), "points \\(d,\\) of one dimension d"),
        (lambda: landscape_between(turned, point(-1, -1), point(1, 1), point(0)), "got shapes"),
        (lambda: landscape_between(lambda x: x, point(-1, -1), point(1, 1)), r"to losses \(n,\).*got shape \(2, 2\)"),
        (lambda: landscape_between(lambda x: 0.0, point(-1, -1), point(1, 1), name="f"), "expected f to take.*float"),
        (lambda: landscape_between(turned, point(-1, -1), point(-0.9, -0.9)), "two minima, got one"),
        (lambda: landscape_between(turned, point(-1, -1), point(1, 1), point(0.9, 0.9)), "give a nearer saddle"),
    ],
)
def test_points_that_are_none_of_a_landscapes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_steps_are_the_mean_first_passage_time_over_the_rate():
    well = built_in_landscape("double-well", barrier=1.0, skew=0.3, walls=40.0)
    (left, right), heat = WELL.minima, temperature(**SGD)
    exact, leading = predicted_steps(well, SGD)
    # From a wall that no walker reaches; a nearer one changes nothing that counts.
    time = passage_time(WELL, start=left, end=right, far=left - 2, temperature=heat)
    assert exact == pytest.approx(time / SGD["lr"], rel=1e-6)
    curvatures = {"minimum": point(WELL.curvature(left)), "saddle": point(WELL.curvature(0.0))}
    assert leading == pytest.approx(escape_time(barrier=1.0, temperature=heat, **curvatures) / SGD["lr"], rel=1e-9)


def test_the_share_of_the_flat_minimum_tends_to_that_of_its_curvature():
    well = built_in_landscape("double-well", barrier=1.0, skew=0.3, walls=40.0)
    exact, leading = predicted_stay(well, {**SGD, "batch_size": 1000.0})["share"]
    left, right = (WELL.curvature(x) for x in WELL.minima)
    # To leading order the two differ by the square root of their curvatures, at every temperature.
    assert leading == pytest.approx(math.sqrt(left) / (math.sqrt(left) + math.sqrt(right)), rel=1e-9)
    assert leading == pytest.approx(
        float(laplace_mass(depths=point(0, 0), curvatures=point(left, right)[:, None], temperature=0.01)[1])
    )
    assert exact == pytest.approx(leading, abs=0.01)  # 100 temperatures deep: corrections are of order T


def test_walkers_leave_and_stay_as_predicted():
    well = built_in_landscape("double-well", barrier=1.0, skew=0.3, walls=40.0)
    said = []
    sgd = {**SGD, "batch_size": 20.0}
    found = escape(well, sgd, walkers=1000, steps=3000, seed=0, update=lambda step, words: said.append(words))
    exact, _ = predicted_steps(well, sgd)
    # Six standard errors, and 5 % for the finite rate.
    assert abs(found["measured"] - exact) < 6 * found["standard_error"] + 0.05 * exact
    assert found["arrived"] + found["censored"] == 1000
    assert said[-1].endswith("of 1,000 walkers arrived")
    share, *_ = [
        row
        for row in stay(well, sgd, walkers=1000, steps=1000, seed=0, update=lambda step, words: None)
        if (row["quantity"], row["origin"]) == ("share", "both")
    ]
    predicted, _ = predicted_stay(well, sgd)["share"]
    assert abs(share["measured"] - predicted) < 6 * share["standard_error"]


def test_walkers_that_diverge_are_said_so():
    well = built_in_landscape("double-well", barrier=1.0, skew=0.3, walls=40.0)
    with pytest.raises(ValueError, match="SGD diverged at lr 1 and batch size 1"):
        escape(
            well, {"lr": 1.0, "noise": 1000.0, "batch_size": 1.0}, walkers=10, steps=20, seed=0, update=lambda *_: None
        )
