"""What the result says about itself, where the solver starts, and its budget."""

from __future__ import annotations

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from symmetric_operators import OUTLIERS, SOLVERS, check, operator, rotated, wanted, zeros

from nsgd import Eigenpairs, top_eigenpairs

# -- what the result says about itself ------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-10])
def test_residuals_are_the_norms_of_hv_minus_lambda_v(solver, tol):
    matrix = rotated(OUTLIERS)
    hvp, _ = operator(matrix)
    pairs = top_eigenpairs(hvp, zeros(200), k=4, solver=solver, tol=tol, repeated=False)
    vectors, values = pairs.eigenvectors, pairs.eigenvalues
    true = torch.linalg.vector_norm(vectors @ matrix - values[:, None] * vectors, dim=1)
    # From a recurrence or from kept products, without a product more: equal to rounding of |lambda_1| = 100.
    torch.testing.assert_close(pairs.residuals, true, rtol=1e-6, atol=1e-10)
    assert pairs.converged == bool((true <= tol * 100.0).all())


@pytest.mark.parametrize("solver", SOLVERS)
def test_residuals_are_right_when_the_budget_ends_early(solver):
    matrix = rotated(OUTLIERS)
    pairs = top_eigenpairs(operator(matrix)[0], zeros(200), k=4, solver=solver, max_hvps=8)
    vectors, values = pairs.eigenvectors, pairs.eigenvalues
    true = torch.linalg.vector_norm(vectors @ matrix - values[:, None] * vectors, dim=1)
    torch.testing.assert_close(pairs.residuals, true, rtol=1e-6, atol=1e-10)


def test_residuals_bound_the_true_ones_where_chains_were_restarted():
    matrix = rotated([50.0, 50.0, 50.0, *np.linspace(-4.0, 4.0, 197)])
    pairs = top_eigenpairs(operator(matrix)[0], zeros(200), k=5, tol=1e-3)
    vectors, values = pairs.eigenvectors, pairs.eigenvalues
    true = torch.linalg.vector_norm(vectors @ matrix - values[:, None] * vectors, dim=1)
    assert bool((true <= pairs.residuals + 1e-10).all())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("max_hvps", [3, 5, 8, 14])
def test_a_budget_used_up_gives_the_best_pairs_and_no_exception(solver, max_hvps):
    matrix = rotated(OUTLIERS)
    hvp, calls = operator(matrix)
    pairs = top_eigenpairs(hvp, zeros(200), k=3, solver=solver, max_hvps=max_hvps, tol=1e-12)
    assert not pairs.converged
    assert pairs.hvps == len(calls) == max_hvps
    torch.testing.assert_close(
        pairs.eigenvectors @ pairs.eigenvectors.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12
    )
    # Ritz values: never above the true ones, and Rayleigh quotients of their vectors.
    assert bool((pairs.eigenvalues <= torch.tensor([100.0, 90.0, 80.0], dtype=torch.float64) + 1e-9).all())
    quotients = ((pairs.eigenvectors @ matrix) * pairs.eigenvectors).sum(1)
    torch.testing.assert_close(pairs.eigenvalues, quotients, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_more_products_give_better_pairs(solver):
    def error(max_hvps):
        pairs = top_eigenpairs(operator(rotated(OUTLIERS))[0], zeros(200), k=3, solver=solver, max_hvps=max_hvps)
        return float((pairs.eigenvalues - torch.tensor([100.0, 90.0, 80.0])).abs().max())

    assert error(6) > error(12) > error(30)


@pytest.mark.parametrize("solver", SOLVERS)
def test_hvps_counts_the_calls_and_the_budget_holds(solver):
    for max_hvps in (None, 12, 40):
        hvp, calls = operator(rotated(OUTLIERS))
        pairs = top_eigenpairs(hvp, zeros(200), k=4, solver=solver, max_hvps=max_hvps)
        assert pairs.hvps == len(calls)
        assert max_hvps is None or pairs.hvps <= max_hvps


def test_lanczos_stops_when_the_residuals_meet_the_tolerance():
    spent = [
        top_eigenpairs(operator(rotated(OUTLIERS))[0], zeros(200), k=4, tol=tol, repeated=False).hvps
        for tol in (1e-1, 1e-3, 1e-8)
    ]
    assert spent[0] < spent[1] < spent[2] <= 6 * 4 + 40


def test_the_search_for_repeated_eigenvalues_can_be_switched_off():
    plain = top_eigenpairs(operator(rotated(OUTLIERS))[0], zeros(200), k=4, repeated=False)
    probed = top_eigenpairs(operator(rotated(OUTLIERS))[0], zeros(200), k=4)
    assert probed.hvps >= plain.hvps + 10


def test_the_cost_of_a_bare_callable_is_unknown():
    assert math.isnan(top_eigenpairs(lambda v: v, zeros(3), k=1).cost_gradients)


def test_the_result_is_frozen():
    pairs = top_eigenpairs(lambda v: v, zeros(3), k=1)
    assert isinstance(pairs, Eigenpairs)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pairs.hvps = 0


# -- start and random numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_first_product_is_with_the_start(solver):
    matrix = rotated(OUTLIERS)
    start = torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    basis = torch.stack([start, start.flip(0)])
    for given_start, direction in ((start, start), (basis, start + start.flip(0)), (start.float(), start)):
        hvp, calls = operator(matrix)
        top_eigenpairs(hvp, zeros(200), k=2, start=given_start, solver=solver)
        # 1e-6: one start is rounded to float32.
        torch.testing.assert_close(calls[0], direction / direction.norm(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("problem", ["tanh_mlp"], indirect=True)
def test_a_loss_starts_at_its_gradient(problem):
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(problem.loss(), problem.params)])
    own = top_eigenpairs(problem.loss(), problem.params, k=2, max_hvps=4)
    told = top_eigenpairs(problem.loss(), problem.params, k=2, max_hvps=4, start=gradient)
    other = top_eigenpairs(problem.loss(), problem.params, k=2, max_hvps=4, start=torch.ones(problem.size))
    torch.testing.assert_close(own.eigenvalues, told.eigenvalues, rtol=1e-10, atol=0)
    assert not torch.allclose(own.eigenvalues, other.eigenvalues, rtol=1e-6)


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_start_without_direction_is_replaced_by_a_seeded_one(bad):
    matrix = rotated([3.0, 2.0, 1.0])
    start = torch.full((3,), bad, dtype=torch.float64)
    pairs = top_eigenpairs(operator(matrix)[0], zeros(3), k=2, start=start, tol=1e-10)
    check(pairs, matrix, [3.0, 2.0], tol=1e-9)


@pytest.mark.parametrize("problem", ["one_parameter", "quadratic"], indirect=True)
def test_a_loss_whose_gradient_is_zero_still_gives_its_curvature(problem):
    matrix = problem.hessian()
    flat = problem.loss_of(problem.model)
    slope = torch.cat([g.reshape(-1) for g in torch.autograd.grad(flat, problem.params)])
    theta = torch.cat([p.reshape(-1) for p in problem.params])
    pairs = top_eigenpairs(problem.loss() - slope @ theta, problem.params, k=1, tol=1e-10)
    check(pairs, matrix, wanted(torch.linalg.eigvalsh(matrix), 1, "LA"), tol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_same_seed_gives_the_same_pairs_and_another_seed_another_path(solver):
    def run(seed):
        hvp, calls = operator(rotated(OUTLIERS))
        return top_eigenpairs(hvp, zeros(200), k=3, seed=seed, solver=solver), calls

    (first, calls), (again, calls_again), (_, calls_other) = run(1), run(1), run(2)
    assert torch.equal(first.eigenvalues, again.eigenvalues)
    assert torch.equal(first.eigenvectors, again.eigenvectors)
    assert all(torch.equal(a, b) for a, b in zip(calls, calls_again, strict=True))
    assert not torch.equal(calls[0], calls_other[0])


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("matrix", [rotated(OUTLIERS), torch.zeros(200, 200, dtype=torch.float64)])
def test_the_global_random_state_is_not_used(solver, matrix):
    def state():
        return torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in np.random.get_state()]

    before = state()
    first = top_eigenpairs(operator(matrix)[0], zeros(200), k=3, solver=solver)
    assert state() == before
    torch.manual_seed(11), random.seed(11), np.random.seed(11)
    again = top_eigenpairs(operator(matrix)[0], zeros(200), k=3, solver=solver)
    assert torch.equal(first.eigenvectors, again.eigenvectors)
