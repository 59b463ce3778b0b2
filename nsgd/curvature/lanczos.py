"""Lanczos with full reorthogonalisation, restarted where a Krylov space closes (Golub & Van Loan, ch. 10)."""

from __future__ import annotations

import torch
from torch import Tensor

from nsgd.curvature.guard import full_precision
from nsgd.curvature.hessian import HVP
from nsgd.curvature.low_rank import Which, leading_indices
from nsgd.curvature.vectors import length, matmul, random_unit

# Products spent on a fresh random vector after convergence, in search of further copies of a repeated eigenvalue:
# a Krylov space holds only one vector of each eigenspace. Ten tell an outlier from a bulk of any size in practice.
_PROBE = 10


def rounding(dtype: torch.dtype) -> float:
    """What residuals are rounding below, as a share of the largest eigenvalue seen."""
    return 10 * torch.finfo(dtype).eps


@full_precision
def _orthogonalised(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Classical Gram-Schmidt, twice, which is enough (Parlett): the remainder (P,) and the coefficients (j,)."""
    coefficients = basis @ vector
    vector = vector - coefficients @ basis
    again = basis @ vector
    return vector - again @ basis, coefficients + again


def _new_unit(vector: Tensor, basis: Tensor) -> Tensor:
    rest, _ = _orthogonalised(vector, basis)
    return rest / length(rest)


def lanczos(
    hvp: HVP,
    start: Tensor,
    *,
    k: int,
    which: Which,
    limit: int,
    tol: float,
    generator: torch.Generator,
    repeated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rayleigh-Ritz in a Krylov space of up to ``limit`` vectors, continued from random vectors where it closes.

    A chain is a Krylov sequence from one vector. It is broken off when it spans an invariant subspace, and, if
    ``repeated``, when the pairs have converged: the next chain starts at a random vector orthogonal to all before.
    The projected matrix is kept whole, so that chains couple; the reorthogonalisation gives its columns for free.

    Args:
        hvp: The product.
        start: Unit vector (P,).
        k: Number of pairs.
        which: The end of the spectrum, as in :func:`nsgd.top_eigenpairs`.
        limit: Products allowed, at least k and at most P.
        tol: Residuals at most ``tol * |lambda_1|``, or rounding of the products, count as converged.
        generator: Draws the vectors that further chains start from.
        repeated: Whether to look for further copies of repeated eigenvalues.

    Returns:
        Values (k,), float64 on the CPU and descending; orthonormal vectors (k, P); bounds of their residuals (k,).
        Memory: (limit + k + 3) P.
    """
    size = start.numel()
    basis = start.new_empty(limit, size)  # (m, P)
    projected = torch.zeros(limit, limit, dtype=torch.float64, device="cpu")  # basis H basis^T
    # Of each broken chain its last vector, and what that one's product had outside, with the norm of it.
    tails: list[tuple[int, float, Tensor]] = []
    probing_from: int | None = None  # first vector of the random chain that looks for missing pairs
    settled = torch.empty(0, dtype=torch.float64, device="cpu")  # the values when that chain began
    vector = start
    for j in range(limit):
        basis[j] = vector
        rest, column = _orthogonalised(hvp(vector), basis[: j + 1])
        projected[j, : j + 1] = projected[: j + 1, j] = column.double().cpu()
        beta = length(rest)
        ritz, coordinates = torch.linalg.eigh(projected[: j + 1, : j + 1])
        full = j + 1 == limit
        chosen = leading_indices(ritz, min(k, j + 1), which)
        values, weights = ritz[chosen], coordinates[:, chosen]  # (k,), (m, k)
        outside = [(j, beta, rest), *(tails if j + 1 < size else [])]
        shares = torch.stack([norm * weights[i].abs() for i, norm, _ in outside])  # (chains, k)
        residuals = shares.sum(0)  # (k,)
        # Below this, what is left of the product is rounding: the space is invariant.
        closed = beta <= 100 * torch.finfo(start.dtype).eps * float(ritz.abs().max())
        enough = max(tol * float(values.abs().max()), rounding(start.dtype) * float(ritz.abs().max()))
        converged = j + 1 >= k and bool((residuals <= enough).all())
        if full:
            break
        if converged and (probing_from is not None or not (repeated or closed)):
            unchanged = len(settled) == k and bool(((values - settled).abs() <= enough).all())
            if probing_from is None or (unchanged and j + 1 - probing_from >= _PROBE):
                break
            restart = closed or not unchanged
        else:
            restart = closed or converged
        if restart:
            tails.append((j, beta, rest))
            if converged:
                probing_from, settled = j + 1, values
            vector = _new_unit(random_unit(start, generator), basis[: j + 1])
        elif not converged and (worst := int(shares.amax(1).argmax())) > 0:
            # What a broken chain left outside holds the pairs up: take that in next, and this chain's rest later.
            _, norm, left = tails.pop(worst - 1)
            tails.append((j, beta, rest))
            vector = _new_unit(left / norm, basis[: j + 1])
        else:
            vector = rest / beta
    return values, matmul(weights.T.to(start), basis[: len(weights)]), residuals
