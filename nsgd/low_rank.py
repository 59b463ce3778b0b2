"""Top eigenpairs of a sum of a few weighted outer products, without forming it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from nsgd.guard import full_precision

Which = Literal["LA", "LM", "SA"]

# Parts of a sum below this share of the largest are rounding error of its entries.
_NEGLIGIBLE = {torch.float32: 1e-5, torch.float64: 1e-12}


@full_precision
def low_rank(weights: Tensor, vectors: Tensor, *, k: int, which: Which = "LA") -> tuple[Tensor, Tensor]:
    """Top k eigenpairs of the sum of ``weights[i] * outer(vectors[i], vectors[i])``, without forming it.

    An eigenproblem of size m and two passes over the vectors: no Hessian-vector product.

    Args:
        weights: (m,), of either sign.
        vectors: (m, P), neither normalised nor orthogonal.
        k: Number of pairs wanted.
        which: The end of the spectrum, as in :func:`nsgd.top_eigenpairs`.

    Returns:
        Eigenvalues (r,), float64 on the CPU and descending, and orthonormal eigenvectors (r, P), with r the smaller
        of k and the rank of the sum.
    """
    roots = weights.abs().sqrt()
    lengths = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64).cpu() * roots.cpu().double()  # (m,)
    longest = float(lengths.max())
    if longest == 0:
        return torch.empty(0, dtype=torch.float64), vectors[:0]
    # (m, P): the sum is scaled^T signs scaled, times longest^2. Squares of very large or small ones leave float32.
    scaled = vectors * (roots.double() / longest).to(vectors)[:, None]
    negligible = _NEGLIGIBLE[vectors.dtype]
    squares, mixing = torch.linalg.eigh((scaled @ scaled.T).cpu().double())
    kept = squares > negligible * squares.max()
    lengths, mixing = squares[kept].sqrt(), mixing[:, kept]  # (r,), (m, r)
    signs = weights.sign().to(mixing)
    inner = lengths[:, None] * (mixing.T @ (signs[:, None] * mixing)) * lengths  # (r, r), in orthonormal coordinates
    values, coordinates = torch.linalg.eigh(inner)
    chosen = wanted(values, min(k, len(values)), which)
    chosen = chosen[values[chosen].abs() > negligible]  # of 1, about: terms of either sign may cancel
    rows = ((mixing / lengths) @ coordinates[:, chosen]).T.to(vectors) @ scaled  # (r, P)
    return values[chosen] * longest**2, _orthonormal(rows)


def _orthonormal(rows: Tensor) -> Tensor:
    """The orthonormal rows closest to rows that are so but for rounding."""
    squares, mixing = torch.linalg.eigh((rows @ rows.T).cpu().double())
    whitening: Tensor = ((mixing / squares.sqrt()) @ mixing.T).to(rows)
    return whitening @ rows


def wanted(ascending: Tensor, k: int, which: Which) -> Tensor:
    """Indices (k,) of the wanted ones among ascending values, in descending order of value."""
    if which == "SA":
        return torch.arange(k).flip(0)
    if which == "LM":
        return ascending.abs().argsort(descending=True, stable=True)[:k].sort(descending=True).values
    return torch.arange(len(ascending) - k, len(ascending)).flip(0)
