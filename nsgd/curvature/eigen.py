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
from typing import Any, Literal

import torch
from torch import Tensor

from nsgd.curvature.arpack import arpack
from nsgd.curvature.checks import check_choice, is_real, not_zero, plain, shown, whole_number
from nsgd.curvature.hessian import HVP, Losses, LossHessian, loss_hessian, say_unreached
from nsgd.curvature.lanczos import lanczos, rounding
from nsgd.curvature.low_rank import Which
from nsgd.curvature.nystrom import nystrom
from nsgd.curvature.vectors import IN_RANGE, checked_params, length, random_unit, vector_dtype

Solver = Literal["lanczos", "arpack", "nystrom"]


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
        params: The parameters, each counted once. P is the number of their entries; dtype and device of the result
            follow them. A matrix among them that trains and that the loss does not reach is warned of.
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
        tol: Residuals at most ``tol * |lambda_1|`` count as converged (|lambda_1|: the largest of the k), and those
            that are rounding beside the largest product seen.
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
    params = checked_params(params)
    size = sum(p.numel() for p in params)
    k, max_hvps, tol, scale = plain(k), plain(max_hvps), plain(tol), not_zero("scale", scale)
    seed = whole_number("seed", seed, least=0, most=2**63 - 1)
    _check(size, k=k, which=which, solver=solver, start=start, max_hvps=max_hvps, tol=tol)
    if not isinstance(repeated, bool):
        raise ValueError(f"expected repeated to be True or False, got {shown(repeated)}")
    with ExitStack() as stack:
        hessian: LossHessian | None = None
        if isinstance(loss_or_hvp, Tensor | Sequence):
            hessian = stack.enter_context(loss_hessian(loss_or_hvp, params, scale=scale))
            say_unreached(hessian.unreached, params, depth=2)
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
            values, vectors = nystrom(hvp, block, k=k, which=which)
            values = values * hvp.unit
            cost = math.nan if hessian is None else hessian.cost(hvp.count)
            residuals = torch.full_like(vectors[:, 0], math.nan)
            return Eigenpairs(values.to(vectors), vectors, residuals, hvp.count, cost, False)
        origin = _start_vector(start, hessian, params, generator)
        if solver == "lanczos":
            limit = min(size, 6 * k + 40 if max_hvps is None else max_hvps)
            values, vectors, residuals = lanczos(
                hvp, origin, k=k, which=which, limit=limit, tol=tol, generator=generator, repeated=repeated
            )
        elif k == size:
            values, vectors, residuals = _dense(hvp, origin)  # ARPACK wants k < P
        else:
            values, vectors, residuals = arpack(
                hvp, origin, k=k, which=which, max_hvps=max_hvps, tol=tol, generator=generator
            )
        cost = math.nan if hessian is None else hessian.cost(hvp.count)
    # Where all of the k are nearly zero, residuals cannot be less than rounding of the products.
    enough = max(tol * float(values.abs().max()), rounding(vectors.dtype) * hvp.largest)
    converged = bool((residuals <= enough).all())
    values, residuals = values * hvp.unit, (residuals * hvp.unit).to(vectors)
    return Eigenpairs(values.to(vectors), vectors, residuals, hvp.count, cost, converged)


def _check(size: int, *, k: Any, which: Any, solver: Any, start: Any, max_hvps: Any, tol: Any) -> None:
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= size:
        raise ValueError(f"expected k to be a whole number from 1 to the number of parameters, {size}, got {shown(k)}")
    check_choice("which", which, Which)
    check_choice("solver", solver, Solver)
    if max_hvps is not None and (not isinstance(max_hvps, int) or isinstance(max_hvps, bool) or max_hvps < k):
        raise ValueError(
            f"expected max_hvps of at least k = {k} (twice that for good directions), got {shown(max_hvps)}"
        )
    if not is_real(tol) or not tol >= 0:
        raise ValueError(f"expected tol >= 0, got {shown(tol)}")
    if start is not None and (not isinstance(start, Tensor) or not start.is_floating_point()):
        raise ValueError(f"expected start to be a tensor of real numbers, got {shown(start)}")
    if solver == "nystrom" and (start is None or start.ndim != 2 or len(start) < k):
        got = "none" if start is None else f"one of shape {tuple(start.shape)}"
        raise ValueError(f"solver='nystrom' expected a block of {k} rows or more as start, ({k}, {size}), got {got}")
    if start is not None and (start.ndim not in (1, 2) or start.shape[-1] != size):
        raise ValueError(f"expected start of shape ({size},) or (j, {size}), got {tuple(start.shape)}")


def _scaled(hvp: HVP, scale: float) -> HVP:
    return hvp if scale == 1.0 else lambda vector: hvp(vector) / scale


def product_of(hvp: HVP, vector: Tensor) -> Tensor:
    """A product with a vector; a ValueError where what is called gives something else."""
    result = hvp(vector)
    if not isinstance(result, Tensor) or result.shape != vector.shape:
        raise ValueError(f"expected products of shape {tuple(vector.shape)}, got {shown(result)}")
    return result


class _Counted:
    """A product that counts its calls and refuses NaN and infinity.

    Its results are in units that float32 can square: 1, or the size of the first that is not zero, if that is far off.
    """

    def __init__(self, hvp: HVP) -> None:
        self.hvp = hvp
        self.count = 0
        self.unit = 1.0  # a power of two, so that nothing is rounded
        self.largest = 0.0  # length of a product so far

    def __call__(self, vector: Tensor) -> Tensor:
        self.count += 1
        result = product_of(self.hvp, vector)
        if not bool(torch.isfinite(result).all()):
            raise FloatingPointError(
                f"Hessian-vector product {self.count} is NaN or infinite; no eigenpairs can be taken"
            )
        size = length(result)
        if size and not self.largest and not IN_RANGE[0] < size < IN_RANGE[1]:
            self.unit = 2.0 ** max(-126, min(126, math.frexp(size)[1]))
        self.largest = max(self.largest, size / self.unit)
        return result.detach() / self.unit if self.unit != 1 else result.detach()


def _start_vector(
    start: Tensor | None, hessian: LossHessian | None, params: list[Tensor], generator: torch.Generator
) -> Tensor:
    like = torch.empty(0, dtype=vector_dtype(params), device=params[0].device)
    if start is not None:
        vector = start.to(like) if start.ndim == 1 else start.to(like).sum(0)
    elif hessian is not None:
        vector = hessian.gradient
    else:
        vector = torch.zeros(sum(p.numel() for p in params), device="cpu").to(like)
    norm = length(vector)
    if norm > 0 and math.isfinite(norm):
        return vector / norm
    return random_unit(vector, generator)


def _dense(hvp: HVP, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    size = like.numel()
    matrix = torch.stack([hvp(row) for row in torch.eye(size, dtype=like.dtype, device=like.device)])
    values, columns = torch.linalg.eigh((matrix + matrix.T) / 2)
    values, vectors = values.flip(0), columns.T.flip(0)
    return values, vectors, torch.linalg.vector_norm(vectors @ matrix - values[:, None] * vectors, dim=1)
