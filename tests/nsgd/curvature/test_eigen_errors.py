from __future__ import annotations

import numpy as np
import pytest
import torch
from symmetric_operators import OUTLIERS, SOLVERS, rotated, zeros

from nsgd import top_eigenpairs


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [1, 4])
def test_a_product_that_is_not_finite_is_an_error_never_an_answer(solver, value, at):
    matrix = rotated(OUTLIERS)
    calls = []

    def hvp(vector):
        calls.append(1)
        result = matrix @ vector
        if len(calls) == at:
            result[7] = value
        return result

    with pytest.raises(FloatingPointError, match=f"product {at} is NaN or infinite"):
        top_eigenpairs(hvp, zeros(200), k=3, solver=solver)
    assert len(calls) == at


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "expected k to be a whole number from 1 to the number of parameters, 6, got 0"),
        ({"k": 7}, "expected k to be a whole number from 1 to the number of parameters, 6, got 7"),
        ({"k": 2.5}, "expected k .*got 2.5"),
        ({"which": "BE"}, "expected which to be one of LA, LM, SA, got 'BE'"),
        ({"solver": "lobpcg"}, "expected solver to be one of lanczos, arpack, nystrom, got 'lobpcg'"),
        ({"max_hvps": 2}, "expected max_hvps of at least k = 3 .*got 2"),
        ({"tol": -1.0}, "expected tol >= 0, got -1.0"),
        ({"tol": float("nan")}, "expected tol >= 0, got nan"),
        ({"start": torch.zeros(5)}, r"expected start of shape \(6,\) or \(j, 6\), got \(5,\)"),
        ({"start": torch.zeros(1, 1, 6)}, r"expected start of shape \(6,\) or \(j, 6\), got \(1, 1, 6\)"),
    ],
)
def test_an_option_out_of_range_is_a_value_error(options, message):
    with pytest.raises(ValueError, match=message):
        top_eigenpairs(lambda v: v, zeros(6), **{"k": 3, **options})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (3.0, "expected a loss tensor.*got a float"),
        (None, "expected a loss tensor.*got a NoneType"),
        (torch.tensor(1.0), "no graph"),
        (lambda v: v[:2], r"expected products of shape \(3,\), got a Tensor of shape \(2,\)"),
    ],
)
def test_a_bad_operator_is_a_value_error(source, message):
    with pytest.raises(ValueError, match=message):
        top_eigenpairs(source, zeros(3), k=1)


def test_parameters_that_cannot_train_are_a_value_error():
    with pytest.raises(ValueError, match="got no parameters"):
        top_eigenpairs(lambda v: v, [], k=1)
    with pytest.raises(ValueError, match="none of the 1 parameters requires a gradient"):
        top_eigenpairs(lambda v: v, [torch.zeros(3)], k=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": True}, "expected k to be a whole number from 1 to .*, got True"),
        ({"scale": 0.0}, "expected scale to be a finite number other than 0, got 0.0"),
        ({"scale": float("nan")}, "expected scale to be a finite number other than 0, got nan"),
        ({"seed": None}, "expected seed to be a whole number of at least 0, got None"),
        ({"start": [1.0]}, "expected start to be a tensor of real numbers, got .1.0"),
        ({"tol": "x"}, "expected tol >= 0, got 'x'"),
        ({"max_hvps": 2.5}, "expected max_hvps of at least k"),
    ],
)
def test_options_of_another_kind_are_one_sentence(options, message):
    w = torch.nn.Parameter(torch.ones(5))
    with pytest.raises(ValueError, match=message):
        top_eigenpairs(w.square().sum(), [w], **{"k": 2, **options})


def test_numbers_of_other_libraries_are_numbers():
    w = torch.nn.Parameter(torch.arange(1.0, 6.0))
    given = {
        "k": np.int64(2),
        "seed": np.int64(3),
        "max_hvps": torch.tensor(20),
        "tol": np.float32(1e-3),
        "scale": 2 * torch.ones(()),
    }
    pairs = top_eigenpairs((w**4).sum() * 2, [w], **given)
    assert pairs.eigenvalues.tolist() == pytest.approx([300.0, 192.0], rel=1e-4)  # 12 w^2
