"""The running average of two low-rank sums, against the dense one in NumPy."""

from __future__ import annotations

import pytest
from sums import SUMS, agrees, dense, of
from symmetric_operators import WHICH

from nsgd.curvature.low_rank import low_rank
from nsgd.directions.running_average import average


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize(("old", "new"), [("positive", "either_sign"), ("rank_3", "positive"), ("one", "duplicates")])
def test_an_average_is_the_dense_convex_combination(old, new, which, decay):
    matrix = decay * dense(*SUMS[old]) + (1 - decay) * dense(*SUMS[new])
    agrees(average(of(old), of(new), decay=decay, k=4, which=which), matrix, 4, which)
    agrees(average(of(new), of(old), decay=1 - decay, k=4, which=which), matrix, 4, which)


def test_an_average_of_equals_is_itself():
    pair = low_rank(*of("positive"), k=6)
    agrees(average(pair, pair, decay=0.4, k=6), dense(*SUMS["positive"]), 6, "LA")
