"""Eigenpairs at the ends of float32, and where the wanted end of the spectrum is zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nsgd import NSGD, top_eigenpairs
from nsgd.curvature.vectors import length


def rotated(spectrum):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), generator=generator, dtype=torch.float64)).Q
    return (basis * spectrum) @ basis.T


@pytest.mark.parametrize("solver", ["lanczos", "arpack", "nystrom"])
@pytest.mark.parametrize("power", [36, 30, 21, 0, -20, -30, -36])
def test_eigenpairs_in_float32_do_not_depend_on_the_size_of_the_curvature(solver, power):
    spectrum = torch.logspace(0, -3, 60, dtype=torch.float64)
    matrix = (rotated(spectrum) * 10.0**power).float()
    start = torch.linalg.eigh(rotated(spectrum)).eigenvectors.T[-6:].float() if solver == "nystrom" else None
    pairs = top_eigenpairs(lambda v: matrix @ v, [nn.Parameter(torch.zeros(60))], k=3, solver=solver, start=start)
    torch.testing.assert_close(pairs.eigenvalues.double() / 10.0**power, spectrum[:3], rtol=1e-3, atol=0)  # tol
    gram = pairs.eigenvectors @ pairs.eigenvectors.T
    torch.testing.assert_close(gram, torch.eye(3), rtol=0, atol=1e-5)
    if solver != "nystrom":
        assert pairs.converged
        assert bool((pairs.residuals <= 1e-3 * pairs.eigenvalues[0]).all())


@pytest.mark.parametrize("power", [21, 30, -20, -30])
def test_a_refresh_by_products_does_not_depend_on_the_size_of_the_loss(power):
    p = nn.Parameter(torch.linspace(1, 2, 30) * 1e-3)
    weights = torch.logspace(0, -3, 30)
    optimizer = NSGD([p], lr=1e-30, k=3, solver="lanczos")
    assert optimizer.refresh((0.5 * 10.0**power) * (weights * p * p).sum())
    assert [value / 10.0**power for value in optimizer.eigenvalues] == pytest.approx(weights[:3].tolist(), rel=1e-2)
    vectors = optimizer.directions([p])
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("solver", ["lanczos", "arpack"])
def test_the_smallest_eigenvalues_of_a_deficient_operator_are_zero_and_converged(k, dtype, solver):
    matrix = rotated(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0] + [0.0] * 45, dtype=torch.float64)).to(dtype)
    pairs = top_eigenpairs(
        lambda v: matrix @ v, [nn.Parameter(torch.zeros(50, dtype=dtype))], k=k, which="SA", solver=solver
    )
    assert pairs.converged
    assert float(pairs.eigenvalues.abs().max()) < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1.0, 1e20, 1e36])
def test_a_length_is_right_where_squares_are_not(size):
    assert length(torch.full((4,), size)) == pytest.approx(2 * size, rel=1e-6)
    assert length(torch.zeros(3)) == length(torch.zeros(0)) == 0
