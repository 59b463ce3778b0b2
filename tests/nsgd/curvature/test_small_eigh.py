"""Eigenpairs of small matrices without a wait."""

from __future__ import annotations

import pytest
import torch

from nsgd.curvature.small import orthogonal_iteration, small_eigh


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decades", [1, 3, 5])
@pytest.mark.parametrize("rank", [40, 7])
def test_orthogonal_iteration_finds_the_sum_that_eigh_finds(dtype, decades, rank):
    """Up to pairs that are so close that they may stand for each other; the kept share of the trace is the same."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -decades, 40, dtype=torch.float64)
    values[rank:] = 0
    matrix = ((axes * values) @ axes.T).to(dtype)
    found, vectors = orthogonal_iteration(matrix)
    exact, columns = small_eigh(matrix)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(40, dtype=dtype), rtol=0, atol=tolerance)
    assert torch.equal(found.sort(descending=True).values, found)
    kept = vectors[:, :20]
    assert float((kept.T @ matrix @ kept).trace()) >= (1 - 2e-3) * float(exact[:20].sum())
    if rank < 20:  # nothing to choose: the same space
        overlap = (kept.T @ columns[:, :rank]).square().sum() / rank
        assert float(overlap) == pytest.approx(1, abs=1e-3)


def test_a_matrix_that_is_not_finite_raises_nothing():
    for function in (small_eigh, orthogonal_iteration):
        values, _ = function(torch.full((5, 5), float("nan"), dtype=torch.float64))
        assert values.shape == (5,)
