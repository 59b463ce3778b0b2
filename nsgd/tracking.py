"""Following the sharpest directions through training: a running average of low-rank estimates, kept at rank k.

One estimate from a few samples is mostly noise, and one from many is dear and soon stale. The exponential average of
many small ones overlaps the exact directions better at a fraction of the price (benchmarks/results/tracking.csv).
An estimate is a sum of weighted outer products: eigenvalues and eigenvectors of a sample's Hessian, or gradients of
small groups of samples, whose second moment has nearly the Hessian's outlying eigenvectors (for a log-likelihood it
is the Fisher matrix: Martens 2020, Papyan 2020).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsgd.eigen import Which, wanted
from nsgd.guard import full_precision
from nsgd.hessian import Losses, group_gradients

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
    scaled = vectors / longest * roots.to(vectors)[:, None]
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


def average(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], *, decay: float, k: int, which: Which = "LA"
) -> tuple[Tensor, Tensor]:
    """Rank-k part of ``decay * old + (1 - decay) * new``, each given as weights (m,) and vectors (m, P)."""
    (old_weights, old_vectors), (new_weights, new_vectors) = old, new
    weights = torch.cat([decay * old_weights.cpu().double(), (1 - decay) * new_weights.cpu().double()])
    return low_rank(weights, torch.cat([old_vectors, new_vectors]), k=k, which=which)


def gradient_moment(losses: Losses, params: Sequence[Tensor], *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Second moment of the gradients of groups of samples, as weights (m,) that sum to 1 and vectors (m, P).

    No product, and no graph of second order: it costs one gradient of the samples. With one sample a group it is the
    empirical Fisher matrix; the smaller the groups, the less it is drawn to the mean gradient, which need not be sharp.

    Args:
        losses: Pairs of closure and sample count, one for each of two or more groups.
        params: The parameters, P entries together.
        scale: What the losses were multiplied by; taken out.

    Raises:
        ValueError: If there are fewer than two groups, or a loss is no scalar that reaches the parameters.
        FloatingPointError: If a loss or a gradient is NaN or infinite.
    """
    gradients, counts = group_gradients(losses, params, scale=scale)
    return counts / counts.sum(), gradients
