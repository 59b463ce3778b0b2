"""Top eigenpairs of sums of weighted outer products, against dense matrices in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sums import SUMS, agrees, dense, draw, of
from symmetric_operators import WHICH

from nsgd.curvature.low_rank import low_rank, squared_lengths


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("k", [1, 3, 50])
@pytest.mark.parametrize("case", SUMS)
def test_the_top_eigenpairs_of_a_sum_are_those_of_the_dense_matrix(case, k, which, dtype):
    agrees(low_rank(*of(case, dtype), k=k, which=which), dense(*SUMS[case]), k, which, dtype)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
def test_the_size_of_the_vectors_does_not_matter_in_float32_either(scale):
    """Squares of 1e25 do not fit into float32, and gradients of 1e25 do."""
    weights, vectors = of("positive", torch.float32)
    values, rows = low_rank(weights, vectors * scale, k=3)
    expected, expected_rows = low_rank(weights, vectors, k=3)
    np.testing.assert_allclose(values.numpy() / scale / scale, expected.numpy(), rtol=1e-5)
    torch.testing.assert_close((rows @ expected_rows.T).abs(), torch.eye(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_rounding_adds_no_directions_where_there_are_many_entries(rank):
    """The Gram matrix of a hundred thousand entries is further from its rank than that of twenty."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(16, rank, generator=generator) @ torch.randn(rank, 100_000, generator=generator)
    values, rows = low_rank(torch.full((16,), 1 / 16), vectors, k=10)
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=0, atol=1e-4)
    assert len(values) == rank


@pytest.mark.parametrize("case", SUMS)
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_vectors_may_come_in_several_parts(case, cut):
    weights, vectors = of(case)
    cut = min(cut, len(vectors))
    whole = low_rank(weights, vectors, k=4)
    parts = low_rank(weights, [vectors[:cut], vectors[cut:]], k=4)
    assert torch.allclose(parts[0], whole[0], rtol=0, atol=1e-12 * float(whole[0].abs().max()))
    agrees(parts, dense(*SUMS[case]), 4, "LA")


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-9, 1.0, 1e9, 1e30])
def test_squared_lengths_of_float32_rows_are_those_in_float64(scale):
    vectors = torch.from_numpy(draw(5, 1000)) * scale
    found, exact = squared_lengths(vectors.float()), vectors.float().double().square().sum(1)
    assert found.dtype == torch.float64
    assert torch.allclose(found, exact, rtol=1e-5)  # a sum of 1000 squares in float32


def test_a_sum_of_nothing_has_no_directions():
    values, vectors = low_rank(torch.ones(3), torch.zeros(3, 5), k=2)
    assert (values.shape, vectors.shape) == ((0,), (0, 5))


@pytest.mark.parametrize("case", ["either_sign", "duplicates"])
def test_the_order_of_the_terms_does_not_matter(case):
    weights, vectors = of(case)
    order = torch.from_numpy(np.random.default_rng(5).permutation(len(weights)))
    values, rows = low_rank(weights, vectors, k=3)
    again, rows_again = low_rank(weights[order], vectors[order], k=3)
    torch.testing.assert_close(again, values, rtol=1e-12, atol=0)
    torch.testing.assert_close(rows_again.T @ rows_again, rows.T @ rows, rtol=0, atol=1e-10)  # signs are free
