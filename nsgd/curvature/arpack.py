"""ARPACK, the solver of Jastrzębski et al. (2019), through SciPy."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nsgd.curvature.hessian import HVP
from nsgd.curvature.low_rank import Which, leading_indices
from nsgd.curvature.vectors import random_unit

# Vectors that ARPACK asked for count as dependent below this share of the largest singular value.
_DEPENDENT = 1e-6


class _OutOfBudget(Exception):
    pass


def arpack(
    hvp: HVP, start: Tensor, *, k: int, which: Which, max_hvps: int | None, tol: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs by ``scipy.sparse.linalg.eigsh``, or, where its budget ends, the best in the space of what it asked for.

    Args:
        hvp: The product.
        start: Unit vector (P,).
        k: Number of pairs, less than P.
        which: The end of the spectrum, as in :func:`nsgd.top_eigenpairs`.
        max_hvps: Products allowed, at least k; None for no limit.
        tol: ARPACK's.
        generator: Draws another start where ARPACK gives up on the first.

    Returns:
        Values (k,), float64 on the CPU and descending; orthonormal vectors (k, P); residuals (k,). Memory: two
        vectors for each product.
    """
    from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator, eigsh  # 0.2 s, and rarely wanted

    size = start.numel()
    inputs: list[Tensor] = []  # every product is recorded: residuals, and pairs at the budget's end, cost none more
    outputs: list[Tensor] = []

    def recorded(vector: Tensor) -> Tensor:
        inputs.append(vector)
        outputs.append(hvp(vector))
        return outputs[-1]

    def matvec(array: NDArray[np.float64]) -> NDArray[np.float64]:
        if max_hvps is not None and len(inputs) >= max_hvps:
            raise _OutOfBudget
        return recorded(torch.from_numpy(array.reshape(-1).copy()).to(start)).double().cpu().numpy()

    vectors: Tensor | None = None
    for origin in (start, random_unit(start, generator)):
        try:
            _, columns = eigsh(
                LinearOperator((size, size), matvec=matvec, dtype=np.float64),
                k=k,
                which=which,
                v0=origin.double().cpu().numpy(),
                tol=tol,
            )
            vectors = torch.from_numpy(columns.T.copy()).to(start)
        except (_OutOfBudget, ArpackNoConvergence):
            break  # what was seen still holds the best pairs for its products
        except ArpackError:
            continue  # it gives up on a start that the operator sends to zero
        break
    if vectors is None:
        while len(inputs) < k or len(_independent(inputs, _DEPENDENT)[0]) < k:  # the operator is nearly zero
            recorded(random_unit(start, generator))
    # A truncated basis would add its error to the residuals of vectors that ARPACK found to the last digit.
    basis, mixing = _independent(inputs, _DEPENDENT if vectors is None else 10 * torch.finfo(start.dtype).eps)
    images = mixing @ torch.stack(outputs)  # (r, P): H basis
    if vectors is None:
        projected = (basis @ images.T).double().cpu()
        ritz, coordinates = torch.linalg.eigh((projected + projected.T) / 2)
        vectors = coordinates[:, leading_indices(ritz, k, which)].T.to(start) @ basis
    mapped = (vectors @ basis.T) @ images  # (k, P): H vectors
    theta = (vectors * mapped).sum(1)
    order = theta.argsort(descending=True, stable=True)
    theta, vectors, mapped = theta[order], vectors[order], mapped[order]
    return theta.double().cpu(), vectors, torch.linalg.vector_norm(mapped - theta[:, None] * vectors, dim=1)


def _independent(vectors: list[Tensor], cutoff: float) -> tuple[Tensor, Tensor]:
    """Orthonormal rows (r, P) that span (m, P) vectors up to near dependence, and their mixture (r, m) of them."""
    left, scales, rows = torch.linalg.svd(torch.stack(vectors), full_matrices=False)
    kept = scales > cutoff * scales[0]
    return rows[kept], (left[:, kept] / scales[kept]).T
