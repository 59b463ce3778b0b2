"""Top eigenpairs of a symmetric operator that is known only by its products.

Lanczos with full reorthogonalisation finds the outlying eigenvalues of a loss's Hessian in about 2k products
(Golub & Van Loan, Matrix Computations, ch. 10). ARPACK, the solver of Jastrzębski et al. (2019), is there as well:
as the paper's own, and as an oracle. Where a block is at hand that nearly spans the wanted space, one sweep of
products over it is cheaper than either (Nyström approximation: Halko, Martinsson & Tropp 2011, section 5.5).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nsgd.curvature.guard import full_precision
from nsgd.curvature.hessian import HVP, Losses, LossHessian, check_params, loss_hessian, vector_dtype
from nsgd.curvature.low_rank import Which, low_rank, wanted

Solver = Literal["lanczos", "arpack", "nystrom"]

# Products spent on a fresh random vector after convergence, in search of further copies of a repeated eigenvalue:
# a Krylov space holds only one vector of each eigenspace. Ten tell an outlier from a bulk of any size in practice.
_PROBE = 10

# Vectors that ARPACK asked for count as dependent below this share of the largest singular value.
_DEPENDENT = 1e-6

# Directions of a block with less curvature than this share of the largest are left out of a Nyström approximation,
# which divides by their curvature; and those whose product is so much longer than their curvature that dividing by it
# would make a value of this many times any product: they mix directions of either sign.
_DIM = 1e-3
_MIXED = 4.0


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenpairs of a symmetric P x P operator, with how well and at what price they were found."""

    eigenvalues: Tensor  # (k,) descending
    eigenvectors: Tensor  # (k, P) orthonormal rows
    residuals: Tensor  # (k,) norm of H v - lambda v (an upper bound of it where chains were restarted)
    hvps: int  # Hessian-vector products
    cost_gradients: float  # forward and backward passes that this was worth; NaN for a bare callable
    converged: bool  # every residual is at most tol * |lambda_1|


def top_eigenpairs(
    loss_or_hvp: Tensor | HVP | Losses,
    params: Iterable[Tensor],
    *,
    k: int = 10,
    which: Which = "LA",
    solver: Solver = "lanczos",
    start: Tensor | None = None,
    max_hvps: int | None = None,
    tol: float = 1e-3,
    seed: int = 0,
    scale: float = 1.0,
    repeated: bool = True,
) -> Eigenpairs:
    """Find k eigenpairs at one end of the spectrum of a Hessian, or of any symmetric operator.

    Args:
        loss_or_hvp: A loss with its graph; pairs of closure and sample count (see
            :func:`nsgd.curvature.hessian.loss_hessian`); or a callable from (P,) to (P,), the product itself.
        params: The parameters. P is the number of their entries; dtype and device of the result follow them.
        k: Number of pairs.
        which: "LA" for the largest eigenvalues, "SA" for the smallest, "LM" for the largest in absolute value.
            Whatever the choice, they are returned in descending order of their signed values.
        solver: "lanczos"; "arpack" for scipy's ``eigsh``; or "nystrom" for one sweep over a block that is known to be
            good, such as the last eigenvectors, or the top of a second moment of gradients
            (:func:`nsgd.directions.samples.gradient_moment`): k + 2 products do there what takes Lanczos about 2k.
        start: Starting vector (P,), or a basis (j, P) whose sum is taken; for Nyström the block itself, j at least k.
            Default: the gradient where a loss is given, otherwise a vector drawn from ``seed``.
        max_hvps: Products allowed; when they are used up the best pairs so far are returned with
            ``converged=False``. Default: 6k + 40 for Lanczos, no limit for ARPACK; Nyström takes one for each row.
        tol: Residuals at most ``tol * |lambda_1|`` count as converged (|lambda_1|: the largest of the k).
        seed: Seeds every random vector; the global random state is not used.
        scale: What the loss was multiplied by; taken out of the eigenvalues.
        repeated: Lanczos only: after convergence, spend 10 products or more on making sure that no copy of a
            repeated eigenvalue is missing.

    Returns:
        The pairs. Memory: (max_hvps + k + 3) P while it runs, twice that many vectors for ARPACK, (4j + k) P for
        Nyström, which leaves residuals unknown, NaN, and so never calls itself converged.

    Raises:
        ValueError: If an argument is out of range.
        FloatingPointError: If a product, or the loss, is NaN or infinite.
    """
    if not isinstance(params, Iterable):
        raise ValueError(f"expected parameters, got a {type(params).__name__}; pass model.parameters()")
    params = list(params)
    check_params(params)
    size = sum(p.numel() for p in params)
    _check(size, k=k, which=which, solver=solver, start=start, max_hvps=max_hvps, tol=tol)
    with ExitStack() as stack:
        hessian: LossHessian | None = None
        if isinstance(loss_or_hvp, Tensor | Sequence):
            hessian = stack.enter_context(loss_hessian(loss_or_hvp, params, scale=scale))
            product: HVP = hessian.hvp
        elif callable(loss_or_hvp):
            product = _scaled(loss_or_hvp, scale)
        else:
            raise ValueError(
                f"expected a loss tensor, a callable (P,) -> (P,) or pairs of closure and sample count, got a "
                f"{type(loss_or_hvp).__name__}"
            )
        hvp = _Counted(product)
        generator = torch.Generator().manual_seed(seed)
        if solver == "nystrom" and start is not None:
            block = start.to(device=params[0].device, dtype=vector_dtype(params))
            values, vectors = _nystrom(hvp, block, k, which)
            cost = math.nan if hessian is None else hessian.cost(hvp.count)
            residuals = torch.full_like(vectors[:, 0], math.nan)
            return Eigenpairs(values.to(vectors), vectors, residuals, hvp.count, cost, False)
        origin = _start_vector(start, hessian, params, generator)
        if solver == "lanczos":
            limit = min(size, 6 * k + 40 if max_hvps is None else max_hvps)
            values, vectors, residuals = _lanczos(hvp, origin, k, which, limit, tol, generator, repeated)
        elif k == size:
            values, vectors, residuals = _dense(hvp, origin)  # ARPACK wants k < P
        else:
            values, vectors, residuals = _arpack(hvp, origin, k, which, max_hvps, tol, generator)
        cost = math.nan if hessian is None else hessian.cost(hvp.count)
    residuals = residuals.to(vectors)
    converged = bool((residuals <= tol * values.abs().max()).all())
    return Eigenpairs(values.to(vectors), vectors, residuals, hvp.count, cost, converged)


def _check(
    size: int, *, k: int, which: str, solver: str, start: Tensor | None, max_hvps: int | None, tol: float
) -> None:
    if not isinstance(k, int) or not 1 <= k <= size:
        raise ValueError(f"expected k to be a whole number from 1 to the number of parameters, {size}, got {k}")
    for name, value, kind in (("which", which, Which), ("solver", solver, Solver)):
        if value not in get_args(kind):
            raise ValueError(f"expected {name} to be one of {', '.join(get_args(kind))}, got {value!r}")
    if max_hvps is not None and max_hvps < k:
        raise ValueError(f"expected max_hvps of at least k = {k} (twice that for good directions), got {max_hvps}")
    if not tol >= 0:
        raise ValueError(f"expected tol >= 0, got {tol}")
    if solver == "nystrom" and (start is None or start.ndim != 2 or len(start) < k):
        got = "none" if start is None else f"one of shape {tuple(start.shape)}"
        raise ValueError(f"solver='nystrom' expected a block of {k} rows or more as start, ({k}, {size}), got {got}")
    if start is not None and (start.ndim not in (1, 2) or start.shape[-1] != size):
        raise ValueError(f"expected start of shape ({size},) or (j, {size}), got {tuple(start.shape)}")


def _scaled(hvp: HVP, scale: float) -> HVP:
    return hvp if scale == 1.0 else lambda vector: hvp(vector) / scale


class _Counted:
    """A product that counts its calls and refuses NaN and infinity."""

    def __init__(self, hvp: HVP) -> None:
        self.hvp = hvp
        self.count = 0

    def __call__(self, vector: Tensor) -> Tensor:
        self.count += 1
        result = self.hvp(vector)
        if result.shape != vector.shape:
            raise ValueError(f"expected products of shape {tuple(vector.shape)}, got {tuple(result.shape)}")
        if not bool(torch.isfinite(result).all()):
            raise FloatingPointError(
                f"Hessian-vector product {self.count} is NaN or infinite; no eigenpairs can be taken"
            )
        return result.detach()


def _start_vector(
    start: Tensor | None, hessian: LossHessian | None, params: list[Tensor], generator: torch.Generator
) -> Tensor:
    like = torch.empty(0, dtype=vector_dtype(params), device=params[0].device)
    if start is not None:
        vector = start.to(like) if start.ndim == 1 else start.to(like).sum(0)
    elif hessian is not None:
        vector = hessian.gradient
    else:
        vector = torch.zeros(sum(p.numel() for p in params)).to(like)
    norm = float(torch.linalg.vector_norm(vector))
    if norm > 0 and math.isfinite(norm):
        return vector / norm
    return _random_unit(vector, generator)


def _random_unit(like: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU: the same vector whatever the device.
    vector = torch.randn(like.numel(), generator=generator, dtype=torch.float64).to(like)
    norm: Tensor = torch.linalg.vector_norm(vector)
    return vector / norm


@full_precision
def _orthogonalised(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Classical Gram-Schmidt, twice, which is enough (Parlett): the remainder (P,) and the coefficients (j,)."""
    coefficients = basis @ vector
    vector = vector - coefficients @ basis
    again = basis @ vector
    return vector - again @ basis, coefficients + again


def _new_unit(vector: Tensor, basis: Tensor) -> Tensor:
    rest, _ = _orthogonalised(vector, basis)
    norm: Tensor = torch.linalg.vector_norm(rest)
    return rest / norm


def _lanczos(
    hvp: HVP,
    start: Tensor,
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
    """
    size = start.numel()
    basis = start.new_empty(limit, size)  # (m, P)
    projected = torch.zeros(limit, limit, dtype=torch.float64)  # basis H basis^T
    # Of each broken chain its last vector, and what that one's product had outside, with the norm of it.
    tails: list[tuple[int, float, Tensor]] = []
    probing_from: int | None = None  # first vector of the random chain that looks for missing pairs
    settled = torch.empty(0, dtype=torch.float64)  # the values when that chain began
    vector = start
    for j in range(limit):
        basis[j] = vector
        rest, column = _orthogonalised(hvp(vector), basis[: j + 1])
        projected[j, : j + 1] = projected[: j + 1, j] = column.double().cpu()
        beta = float(torch.linalg.vector_norm(rest))
        ritz, coordinates = torch.linalg.eigh(projected[: j + 1, : j + 1])
        full = j + 1 == limit
        chosen = wanted(ritz, min(k, j + 1), which)
        values, weights = ritz[chosen], coordinates[:, chosen]  # (k,), (m, k)
        outside = [(j, beta, rest), *(tails if j + 1 < size else [])]
        shares = torch.stack([norm * weights[i].abs() for i, norm, _ in outside])  # (chains, k)
        residuals = shares.sum(0)  # (k,)
        # Below this, what is left of the product is rounding: the space is invariant.
        closed = beta <= 100 * torch.finfo(start.dtype).eps * float(ritz.abs().max())
        converged = j + 1 >= k and bool((residuals <= tol * values.abs().max()).all())
        if full:
            break
        if converged and (probing_from is not None or not (repeated or closed)):
            unchanged = len(settled) == k and bool(((values - settled).abs() <= tol * values.abs().max()).all())
            if probing_from is None or (unchanged and j + 1 - probing_from >= _PROBE):
                break
            restart = closed or not unchanged
        else:
            restart = closed or converged
        if restart:
            tails.append((j, beta, rest))
            if converged:
                probing_from, settled = j + 1, values
            vector = _new_unit(_random_unit(start, generator), basis[: j + 1])
        elif not converged and (worst := int(shares.amax(1).argmax())) > 0:
            # What a broken chain left outside holds the pairs up: take that in next, and this chain's rest later.
            _, norm, left = tails.pop(worst - 1)
            tails.append((j, beta, rest))
            vector = _new_unit(left / norm, basis[: j + 1])
        else:
            vector = rest / beta
    return values, _product(weights.T.to(start), basis[: len(weights)]), residuals


@full_precision
def _product(left: Tensor, right: Tensor) -> Tensor:
    return left @ right


def _nystrom(hvp: HVP, block: Tensor, k: int, which: Which) -> tuple[Tensor, Tensor]:
    """Pairs of Y (W Y)^+ Y^T, with W (j, P) the orthonormal rows of a block and Y = H W^T its products."""
    rows = torch.linalg.qr(block.T).Q.T
    images = torch.stack([hvp(row) for row in rows])
    inner = _product(rows, images.T).cpu().double()
    ritz, coordinates = torch.linalg.eigh((inner + inner.T) / 2)
    mixed = _product(coordinates.T.to(images), images)  # (j, P), the products of the Ritz vectors
    lengths = torch.linalg.vector_norm(mixed, dim=1).cpu().double()
    kept = (ritz.abs() > _DIM * ritz.abs().max()) & (lengths.square() <= _MIXED * lengths.max() * ritz.abs())
    if int(kept.sum()) >= k:
        values, vectors = low_rank(1 / ritz[kept], mixed[kept.to(mixed.device)], k=k, which=which)
        if len(values) == k:
            return values, vectors
    chosen = wanted(ritz, k, which)  # the operator has fewer outstanding directions: the block's own have to do
    return ritz[chosen], _product(coordinates[:, chosen].T.to(rows), rows)


def _dense(hvp: HVP, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    size = like.numel()
    matrix = torch.stack([hvp(row) for row in torch.eye(size, dtype=like.dtype, device=like.device)])
    values, columns = torch.linalg.eigh((matrix + matrix.T) / 2)
    values, vectors = values.flip(0), columns.T.flip(0)
    return values, vectors, torch.linalg.vector_norm(vectors @ matrix - values[:, None] * vectors, dim=1)


class _OutOfBudget(Exception):
    pass


def _arpack(
    hvp: HVP, start: Tensor, k: int, which: Which, max_hvps: int | None, tol: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
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
    for origin in (start, _random_unit(start, generator)):
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
            recorded(_random_unit(start, generator))
    # A truncated basis would add its error to the residuals of vectors that ARPACK found to the last digit.
    basis, mixing = _independent(inputs, _DEPENDENT if vectors is None else 10 * torch.finfo(start.dtype).eps)
    images = mixing @ torch.stack(outputs)  # (r, P): H basis
    if vectors is None:
        projected = (basis @ images.T).double().cpu()
        ritz, coordinates = torch.linalg.eigh((projected + projected.T) / 2)
        vectors = coordinates[:, wanted(ritz, k, which)].T.to(start) @ basis
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
