"""One sweep of products over a block (Nyström approximation: Halko, Martinsson & Tropp 2011, section 5.5)."""

from __future__ import annotations

import torch
from torch import Tensor

from nsgd.curvature.hessian import HVP
from nsgd.curvature.low_rank import Which, leading_indices, low_rank
from nsgd.curvature.vectors import matmul

# Directions of a block with less curvature than this share of the largest are left out of a Nyström approximation,
# which divides by their curvature; and those whose product is so much longer than their curvature that dividing by it
# would make a value of this many times any product: they mix directions of either sign.
_DIM = 1e-3
_MIXED = 4.0


def nystrom(hvp: HVP, block: Tensor, *, k: int, which: Which) -> tuple[Tensor, Tensor]:
    """Pairs of Y (W Y)^+ Y^T, with W (j, P) the orthonormal rows of a block and Y = H W^T its products.

    Args:
        hvp: The product.
        block: (j, P), j at least k, which nearly spans the wanted space.
        k: Number of pairs.
        which: The end of the spectrum, as in :func:`nsgd.top_eigenpairs`.

    Returns:
        Values (k,), float64 on the CPU and descending, and orthonormal vectors (k, P). It takes j products and memory
        for (4j + k) P.
    """
    rows = torch.linalg.qr(block.T).Q.T
    images = torch.stack([hvp(row) for row in rows])
    inner = matmul(rows, images.T).cpu().double()
    ritz, coordinates = torch.linalg.eigh((inner + inner.T) / 2)
    mixed = matmul(coordinates.T.to(images), images)  # (j, P), the products of the Ritz vectors
    lengths = torch.linalg.vector_norm(mixed, dim=1).cpu().double()
    kept = (ritz.abs() > _DIM * ritz.abs().max()) & (lengths.square() <= _MIXED * lengths.max() * ritz.abs())
    if int(kept.sum()) >= k:
        values, vectors = low_rank(1 / ritz[kept], mixed[kept.to(mixed.device)], k=k, which=which)
        if len(values) == k:
            return values, vectors
    # The operator has fewer outstanding directions: the block's own have to do.
    chosen = leading_indices(ritz, k, which)
    return ritz[chosen], matmul(coordinates[:, chosen].T.to(rows), rows)
