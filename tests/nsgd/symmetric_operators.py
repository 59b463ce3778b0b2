"""Symmetric matrices, their products, and what is expected of eigenpairs."""

from __future__ import annotations

import numpy as np
import torch

WHICH = ("LA", "LM", "SA")
SOLVERS = ("lanczos", "arpack")


def wanted(spectrum, k, which):
    """The k values at that end of a spectrum, descending, by NumPy."""
    spectrum = np.sort(np.asarray(spectrum, dtype=np.float64))
    if which == "LM":
        chosen = spectrum[np.argsort(-np.abs(spectrum), kind="stable")[:k]]
    else:
        chosen = spectrum[-k:] if which == "LA" else spectrum[:k]
    return np.sort(chosen)[::-1].copy()


def check(pairs, matrix, expected, *, tol):
    """Eigenvalues, eigenvectors (by their residual, for they are not unique) and orthonormality."""
    scale = max(float(torch.linalg.matrix_norm(matrix, 2)), 1e-300)
    values, vectors = pairs.eigenvalues, pairs.eigenvectors
    np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=tol * scale)
    assert bool((values[:-1] >= values[1:]).all())
    # Orthonormal to rounding: two passes of Gram-Schmidt over some tens of vectors.
    eps = torch.finfo(vectors.dtype).eps
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(values)).to(vectors), rtol=0, atol=1e3 * eps)
    residuals = torch.linalg.vector_norm(vectors @ matrix - values[:, None] * vectors, dim=1)
    assert float(residuals.max()) <= tol * scale
    return residuals


def operator(matrix):
    """The product with a matrix, and the list of the vectors that it was called with."""
    calls = []

    def hvp(vector):
        calls.append(vector.clone())
        return matrix.to(vector) @ vector

    return hvp, calls


def zeros(size, dtype=torch.float64):
    return [torch.zeros(size, dtype=dtype, requires_grad=True)]


def rotated(spectrum, seed=0):
    rotation = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(spectrum), len(spectrum))))[0]
    return torch.from_numpy(rotation @ np.diag(np.asarray(spectrum, dtype=np.float64)) @ rotation.T)


OUTLIERS = (100.0, 90.0, 80.0, 70.0, -60.0, *np.linspace(-5.0, 5.0, 195))  # P = 200: above a bulk, as in training
