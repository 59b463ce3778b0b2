"""Eigenpairs of small symmetric matrices, without waiting for the device that they are on."""

from __future__ import annotations

import torch
from torch import Tensor

# Sweeps of orthogonal iteration. A pair of eigenvalues of ratio r is told apart to r^(2 sweeps); those that are closer
# span nearly the same sum of outer products, and the next fold begins where this one ended.
_SWEEPS = 12
# Added to the eigenvalues, as a share of the largest, so that a factorisation exists: sqrt of the precision.
_SHIFT = {torch.float64: 1e-7, torch.float32: 1e-3}

_NEWTON = 8  # steps that square the distance from the identity: more than enough from a tenth


def small_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), descending, and eigenvectors, as columns (n, n), of a positive semi-definite matrix (n, n).

    On the CPU by LAPACK; elsewhere by orthogonal iteration (Golub & Van Loan, Matrix Computations, 8.2.4), since
    ``torch.linalg.eigh`` reads an error flag there, for which the host would wait. A matrix that is not finite gives
    numbers that mean nothing, and no error.
    """
    finite = matrix.isfinite().all()
    matrix = torch.where(finite, matrix, torch.zeros_like(matrix))
    if matrix.device.type == "cpu":
        values, vectors = torch.linalg.eigh(matrix)
        return values.flip(0), vectors.flip(1)
    return orthogonal_iteration(matrix)


def orthogonal_iteration(matrix: Tensor, sweeps: int = _SWEEPS) -> tuple[Tensor, Tensor]:
    """The same by powers of the matrix, orthonormalised by Cholesky factors: no read of the device."""
    size = len(matrix)
    eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    scale = matrix.diagonal().sum().clamp(min=torch.finfo(matrix.dtype).tiny)
    shifted = matrix / scale + _SHIFT[matrix.dtype] * eye
    basis = eye[:, matrix.diagonal().argsort(descending=True, stable=True)]
    for _ in range(sweeps):
        basis = _orthonormal(shifted @ basis)
    basis = _orthonormal(basis)  # once more, for what the first loses to rounding
    values = ((matrix @ basis) * basis).sum(0)
    order = values.argsort(descending=True, stable=True)
    return values[order], basis[:, order]


def _orthonormal(columns: Tensor) -> Tensor:
    factor, _ = torch.linalg.cholesky_ex(columns.T @ columns, check_errors=False)
    rows: Tensor = torch.linalg.solve_triangular(factor, columns.T, upper=False)
    return rows.T


def inverse_root(matrix: Tensor) -> Tensor:
    """The inverse square root (n, n) of a matrix near the identity, but for rows of zeros, which it leaves alone.

    By the coupled Newton iteration (Higham, Functions of Matrices, 6.7): products alone. Where that does not converge,
    the identity.
    """
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    start = matrix + torch.diag((matrix.diagonal() < 0.5).to(matrix))
    root, inverse = start, eye
    for _ in range(_NEWTON):
        half = 1.5 * eye - 0.5 * inverse @ root
        root, inverse = root @ half, half @ inverse
    good = (inverse @ start @ inverse - eye).abs().max() < 0.5
    return torch.where(good, inverse, eye)
