"""Top eigenpairs of a sum of a few weighted outer products, without forming it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from nsgd.curvature.checks import check_choice, check_vectors, of_their_kind, shown, whole_number
from nsgd.curvature.guard import full_precision
from nsgd.curvature.small import small_eigh

Which = Literal["LA", "LM", "SA"]

# Parts of a sum below this share of the largest are rounding error of its entries.
NEGLIGIBLE = {torch.float32: 1e-5, torch.float64: 1e-12}


# Between these, float32 holds the squares of the largest entries and sums of a billion of them.
_SAFE = (1e-12, 1e12)


@of_their_kind
@full_precision
def low_rank(
    weights: Tensor, vectors: Tensor | Sequence[Tensor], *, k: int, which: Which = "LA"
) -> tuple[Tensor, Tensor]:
    """Top k eigenpairs of the sum of ``weights[i] * outer(vectors[i], vectors[i])``, without forming it.

    An eigenproblem of size m and two passes over the vectors: no Hessian-vector product, and no copy of them.

    Args:
        weights: (m,), of either sign.
        vectors: (m, P), neither normalised nor orthogonal; or several of these, m rows in all.
        k: Number of pairs wanted.
        which: The end of the spectrum, as in :func:`nsgd.top_eigenpairs`.

    Returns:
        Eigenvalues (r,), float64 on the CPU and descending, and orthonormal eigenvectors (r, P), with r the smaller
        of k and the rank of the sum.

    Raises:
        ValueError: If the shapes do not fit, the vectors are not in float32 or float64, something is not finite, or k
            is below 1.
    """
    whole_number("k", k, least=1)
    check_choice("which", which, Which)
    parts = [vectors] if isinstance(vectors, Tensor) else list(vectors)
    _check_rows(weights, parts)
    parts, scale = _in_range(parts)
    weights = weights.cpu().double() * scale**2
    roots = weights.abs().sqrt()  # (m,)
    gram = _gram(parts) * roots[:, None] * roots
    longest = float(gram.diagonal().max())
    if not math.isfinite(longest):
        raise ValueError("expected weights and vectors that are finite, got NaN or infinite ones; leave such rows out")
    if longest == 0:
        return torch.empty(0, dtype=torch.float64, device="cpu"), parts[0][:0]
    negligible = NEGLIGIBLE[parts[0].dtype]
    squares, mixing = torch.linalg.eigh(gram / longest)
    kept = squares > negligible * squares.max()
    lengths, mixing = squares[kept].sqrt(), mixing[:, kept]  # (r,), (m, r)
    inner = lengths[:, None] * (mixing.T @ (weights.sign()[:, None] * mixing)) * lengths  # orthonormal coordinates
    values, coordinates = torch.linalg.eigh(inner)
    chosen = leading_indices(values, min(k, len(values)), which)
    chosen = chosen[values[chosen].abs() > negligible]  # of 1, about: terms of either sign may cancel
    mixture = ((mixing / lengths) @ coordinates[:, chosen]).T * (roots / longest**0.5)  # (r, m)
    cuts = mixture.to(parts[0]).split([len(part) for part in parts], dim=1)
    rows = cuts[0] @ parts[0]
    for cut, part in zip(cuts[1:], parts[1:], strict=True):
        rows.addmm_(cut, part)
    return values[chosen] * longest, _orthonormal(rows)


def _check_rows(weights: Tensor, parts: list[Tensor]) -> None:
    check_vectors(weights=weights)
    for part in parts:
        if part.ndim != 2 or part.shape[1] != parts[0].shape[1] or part.dtype not in NEGLIGIBLE:
            raise ValueError(f"expected vectors (m, P) in float32 or float64, got {shown(part)} in {part.dtype}")
    if len(weights) == 0 or sum(map(len, parts)) != len(weights):
        raise ValueError(f"expected a vector for each of {len(weights)} weights, got {sum(map(len, parts))}")


def top_of_sum(gram: Tensor, weights: Tensor, k: int, *, negligible: float) -> tuple[Tensor, Tensor]:
    """Top k eigenpairs of a sum of weighted outer products, from inner products alone, on the device; no host sync.

    Args:
        gram: Inner products of the vectors, (n, n).
        weights: Of their outer products, (n,), none negative.
        k: Number of pairs, at most n.
        negligible: Share of the largest eigenvalue below which the rest is rounding error: zero, with a zero vector.

    Returns:
        Eigenvalues (k,), descending, and the mixture (k, n) of the vectors that gives orthonormal eigenvectors.
    """
    roots = weights.sqrt()
    values, vectors = small_eigh(gram * roots[:, None] * roots)
    values, vectors = values[:k], vectors[:, :k]
    kept = values > negligible * values[0]
    lengths = torch.where(kept, values, math.inf).sqrt()
    return torch.where(kept, values, 0.0), (vectors / lengths).T * roots


@full_precision
def squared_lengths(vectors: Tensor) -> Tensor:
    """Squared lengths of rows (m, P): (m,), float64 on the CPU."""
    (safe,), scale = _in_range([vectors])
    # Not in float64, for which torch's norm takes twenty times as long.
    lengths: Tensor = torch.linalg.vector_norm(safe, dim=1)
    return lengths.cpu().double().square() * scale**2


def _in_range(parts: list[Tensor]) -> tuple[list[Tensor], float]:
    """Vectors whose squares float32 holds, and what they have to be multiplied by: themselves and 1, but for few."""
    largest = max((float(bound.abs()) for part in parts if part.numel() for bound in torch.aminmax(part)), default=0.0)
    if largest == 0 or _SAFE[0] < largest < _SAFE[1]:
        return parts, 1.0
    return [part / largest for part in parts], largest


def _gram(parts: list[Tensor]) -> Tensor:
    """Inner products of all rows, (m, m), float64 on the CPU."""
    blocks = [[(one @ other.T).cpu().double() for other in parts[: i + 1]] for i, one in enumerate(parts)]
    whole = [[blocks[j][i].T if j > i else blocks[i][j] for j in range(len(parts))] for i in range(len(parts))]
    return torch.cat([torch.cat(row, dim=1) for row in whole])


def _orthonormal(rows: Tensor) -> Tensor:
    """The orthonormal rows closest to rows that are so but for rounding; themselves where that is close enough."""
    gram = (rows @ rows.T).cpu().double()
    if float((gram - torch.eye(len(rows), device="cpu")).abs().max()) < NEGLIGIBLE[rows.dtype]:
        return rows
    squares, mixing = torch.linalg.eigh(gram)
    whitening: Tensor = ((mixing / squares.sqrt()) @ mixing.T).to(rows)
    return whitening @ rows


def leading_indices(ascending: Tensor, k: int, which: Which) -> Tensor:
    """Indices (k,) of the wanted ones among ascending values, in descending order of value."""
    if which == "SA":
        return torch.arange(k, device="cpu").flip(0)
    if which == "LM":
        return ascending.abs().argsort(descending=True, stable=True)[:k].sort(descending=True).values
    return torch.arange(len(ascending) - k, len(ascending), device="cpu").flip(0)
