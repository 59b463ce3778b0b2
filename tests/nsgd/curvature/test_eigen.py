from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from symmetric_operators import OUTLIERS, SOLVERS, WHICH, check, operator, rotated, wanted, zeros

from nsgd import top_eigenpairs


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("solver", SOLVERS)
def test_pairs_of_a_loss_agree_with_the_dense_hessian(problem, which, solver):
    k = min(5, problem.size)
    matrix = problem.hessian()
    pairs = top_eigenpairs(problem.loss(), problem.params, k=k, which=which, solver=solver, tol=1e-10)
    check(pairs, matrix, wanted(torch.linalg.eigvalsh(matrix), k, which), tol=1e-7)
    assert pairs.converged
    assert pairs.cost_gradients == 1 + 2 * pairs.hvps


@pytest.mark.parametrize("problem", ["tanh_mlp", "conv_batchnorm"], indirect=True)
def test_pairs_over_several_batches_agree_with_the_dense_hessian(problem):
    total = sum(n for _, n in problem.parts)
    matrix = sum(problem.hessian(part) * (n / total) for part, n in problem.parts)
    pairs = top_eigenpairs(problem.batches(), problem.params, k=5, tol=1e-10)
    check(pairs, matrix, wanted(torch.linalg.eigvalsh(matrix), 5, "LA"), tol=1e-7)
    assert pairs.cost_gradients == 1 + 3 * pairs.hvps


@pytest.mark.parametrize("problem", ["tanh_mlp"], indirect=True)
def test_the_scale_is_taken_out_of_the_eigenvalues(problem):
    plain = top_eigenpairs(problem.loss(), problem.params, k=3, tol=1e-10)
    scaled = top_eigenpairs(problem.loss() * 512.0, problem.params, k=3, tol=1e-10, scale=512.0)
    # A power of two scales without rounding.
    torch.testing.assert_close(scaled.eigenvalues, plain.eigenvalues, rtol=1e-13, atol=0)
    hvp, _ = operator(rotated([4.0, 2.0, 1.0]))
    assert float(top_eigenpairs(hvp, zeros(3), k=1, scale=2.0).eigenvalues) == pytest.approx(2.0)
    # Ascent on f is descent on -f.
    assert float(top_eigenpairs(hvp, zeros(3), k=1, scale=-1.0).eigenvalues) == pytest.approx(-1.0)


# Few values, so that repeated eigenvalues, zeros and ties are common.
SPECTRA = st.lists(st.sampled_from([-3.0, -1.0, 0.0, 1e-3, 1.0, 2.0, 2.5, 10.0]), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(spectrum=SPECTRA, data=st.data(), seed=st.integers(0, 5))
@pytest.mark.parametrize("solver", SOLVERS)
def test_pairs_agree_with_numpy_on_random_symmetric_matrices(solver, spectrum, data, seed):
    matrix = rotated(spectrum, seed)
    size = len(spectrum)
    k = data.draw(st.integers(1, size), label="k")
    which = data.draw(st.sampled_from(WHICH), label="which")
    hvp, calls = operator(matrix)
    pairs = top_eigenpairs(hvp, zeros(size), k=k, which=which, solver=solver, tol=1e-10, seed=seed)
    expected = wanted(np.linalg.eigvalsh(matrix.numpy()), k, which)
    if which == "LM":  # of two values of one size, either is right
        check(pairs, matrix, pairs.eigenvalues.numpy(), tol=1e-9)
        sizes = np.sort(np.abs(pairs.eigenvalues.numpy()))
        np.testing.assert_allclose(sizes, np.sort(np.abs(expected)), rtol=0, atol=1e-8)
    else:
        check(pairs, matrix, expected, tol=1e-9)
    assert pairs.hvps == len(calls)


@pytest.mark.parametrize("multiplicity", [1, 2, 3, 5])
@pytest.mark.parametrize("which", WHICH)
def test_lanczos_finds_every_copy_of_a_repeated_eigenvalue(multiplicity, which):
    """In 200 dimensions no Krylov space gets all copies by using up the dimensions."""
    outliers = [*[50.0] * multiplicity, 40.0, 30.0, 20.0, 10.0]
    spectrum = [*outliers, *[-1.01 * value for value in outliers], *np.linspace(-2.0, 2.0, 200 - 2 * len(outliers))]
    matrix = rotated(spectrum)
    pairs = top_eigenpairs(operator(matrix)[0], zeros(200), k=5, which=which, tol=1e-8, max_hvps=120)
    check(pairs, matrix, wanted(spectrum, 5, which), tol=1e-7)
    assert pairs.converged


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("k", [1, 5])
def test_zero_curvature_gives_zeros_and_orthonormal_vectors(solver, which, k):
    hvp, _ = operator(torch.zeros(5, 5, dtype=torch.float64))
    pairs = top_eigenpairs(hvp, zeros(5), k=k, which=which, solver=solver)
    check(pairs, torch.zeros(5, 5, dtype=torch.float64), np.zeros(k), tol=0.0)
    assert pairs.converged


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("curvature", [3.0, 0.0, -2.0])
@pytest.mark.parametrize("which", WHICH)
def test_one_parameter_takes_one_product(solver, curvature, which):
    pairs = top_eigenpairs(lambda v: curvature * v, zeros(1), k=1, which=which, solver=solver)
    assert pairs.eigenvalues.tolist() == [curvature]
    assert pairs.eigenvectors.abs().tolist() == [[1.0]]
    assert (pairs.hvps, pairs.converged) == (1, True)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_in_an_invariant_subspace_does_not_hide_the_rest(solver):
    matrix = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0], dtype=torch.float64))
    for index in (5, 3):  # the product of the first is zero
        start = torch.eye(6, dtype=torch.float64)[index]
        pairs = top_eigenpairs(operator(matrix)[0], zeros(6), k=2, start=start, solver=solver, tol=1e-10)
        check(pairs, matrix, [5.0, 4.0], tol=1e-9)
        assert pairs.converged


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_size_of_the_curvature_does_not_matter(solver, scale):
    matrix = rotated(OUTLIERS) * scale
    pairs = top_eigenpairs(operator(matrix)[0], zeros(200), k=4, solver=solver, tol=1e-8)
    check(pairs, matrix, np.array([100.0, 90.0, 80.0, 70.0]) * scale, tol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_float32_parameters_give_float32_pairs(solver):
    matrix = rotated(OUTLIERS)
    pairs = top_eigenpairs(operator(matrix)[0], zeros(200, torch.float32), k=5, which="LM", solver=solver, tol=1e-4)
    assert {pairs.eigenvalues.dtype, pairs.eigenvectors.dtype, pairs.residuals.dtype} == {torch.float32}
    # Products of 200 terms in float32 are good to about 200 * 6e-8.
    check(pairs, matrix.float(), [100.0, 90.0, 80.0, 70.0, -60.0], tol=2e-4)
    assert pairs.converged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_give_float32_pairs(dtype):
    pairs = top_eigenpairs(operator(rotated([3.0, 2.0, 1.0]))[0], zeros(3, dtype), k=2)
    assert pairs.eigenvectors.dtype == torch.float32
