"""Directions by Hessian-vector products: the paper's own, dearer, and the choice where the eigenvectors are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from torch import Tensor

from nsgd.curvature.eigen import Solver, top_eigenpairs
from nsgd.curvature.hessian import HVP, Closure, Losses, loss_hessian
from nsgd.directions.processes import averaged, inner_modules_only, led, together
from nsgd.directions.schedule import Counts
from nsgd.options import DampingOptions

# Products beyond 2k: at 2k + 2, k = 10, the directions of a small CNN in training overlap the exact ones by 0.77 to
# 0.94 (benchmarks/results/eigen.csv), and what a stale basis loses until the next refresh is more than is missing.
_EXTRA_PRODUCTS = 2


class Spent:
    """Cost of a refresh so far, also one that fails: its gradient, and the products."""

    def __init__(self) -> None:
        self.hvps, self.gradients = 0, 1.0

    def count(self, counts: Counts, batch_fraction: float) -> None:
        """Add it to what the run has spent."""
        counts.attempted_at = counts.steps
        counts.hvps += self.hvps
        counts.cost_gradients += self.gradients * batch_fraction


def eigenpairs_of(
    loss: Tensor | Closure | Losses,
    params: Sequence[Tensor],
    options: DampingOptions,
    spent: Spent,
    *,
    scale: float,
    seed: int,
) -> list[Tensor]:
    """Top eigenpairs of a loss's Hessian at the price of a refresh: up to 2k + 2 products by Lanczos.

    In several processes they are those of the mean of all their losses, the same in each.

    Args:
        loss: As for :func:`nsgd.curvature.hessian.loss_hessian`.
        params: The parameters.
        options: Number of pairs, end of the spectrum, and solver.
        spent: Counts the products.
        scale: What the loss was multiplied by, negative for an objective that is maximised.
        seed: Of the solver.

    Returns:
        Eigenvalues (k,), descending, eigenvectors (k, P) and residuals (k,).
    """
    solver: Solver = "arpack" if options.solver == "arpack" else "lanczos"
    with ExitStack() as stack:
        with together(params[0].device):
            stack.enter_context(inner_modules_only())
            hessian = stack.enter_context(loss_hessian(loss, params, scale=scale))
        start = averaged(hessian.gradient)

        def hvp(vector: Tensor) -> Tensor:
            spent.hvps += 1
            spent.gradients = hessian.cost(spent.hvps)
            return hessian.hvp(vector)

        def solve(product: HVP) -> list[Tensor]:
            pairs = top_eigenpairs(
                product,
                params,
                k=options.k,
                which=options.which,
                solver=solver,
                start=start,
                max_hvps=2 * options.k + _EXTRA_PRODUCTS if solver == "lanczos" else None,
                seed=seed,
                repeated=False,
            )
            return [pairs.eigenvalues, pairs.eigenvectors, pairs.residuals]

        values = start.new_empty(options.k)
        return led(solve, hvp, [values, start.new_empty(options.k, start.numel()), values])
