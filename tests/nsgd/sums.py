"""Sums of weighted outer products, and what is expected of their top eigenpairs, by NumPy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from symmetric_operators import check, wanted

# Eigenvalues and residuals against the largest eigenvalue. Their squares are what is computed: in float32 the Gram
# matrix of some tens of vectors is good to about 1e-6, and residuals to the root of what was rounded away.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def repeated(vectors):
    return np.concatenate([vectors, vectors, 2 * vectors])


# name: weights (m,), vectors (m, P)
SUMS = {
    "positive": (np.arange(1.0, 7.0), draw(6, 20)),
    "either_sign": (np.array([3.0, -2.0, 1.0, -1.0, 0.5, -4.0]), draw(6, 20)),
    "negative": (-np.arange(1.0, 7.0), draw(6, 20)),
    "some_zero": (np.array([3.0, 0.0, 1.0, 0.0]), draw(4, 20)),
    "more_than_entries": (np.linspace(-1.0, 2.0, 30), draw(30, 8)),
    "rank_3": (np.linspace(0.5, 1.5, 12), draw(12, 3) @ draw(3, 20, seed=1)),
    "rank_3_either_sign": (np.linspace(-1.0, 1.5, 12), draw(12, 3) @ draw(3, 20, seed=1)),
    "duplicates": (np.linspace(0.5, 1.5, 12), repeated(draw(4, 20))),
    "one": (np.array([2.0]), draw(1, 20)),
    "one_entry": (np.array([2.0, 1.0]), draw(2, 1)),
}


def dense(weights, vectors):
    return (vectors.T * weights) @ vectors


def of(case, dtype=torch.float64):
    weights, vectors = SUMS[case]
    return torch.from_numpy(weights), torch.from_numpy(vectors).to(dtype)


def nonzero(matrix):
    values = np.linalg.eigvalsh(matrix)
    return values[np.abs(values) > 1e-9 * np.abs(values).max()]


def agrees(pairs, matrix, k, which, dtype=torch.float64):
    values, vectors = pairs
    assert (values.dtype, vectors.dtype) == (torch.float64, dtype)
    pairs = SimpleNamespace(eigenvalues=values, eigenvectors=vectors)
    check(pairs, torch.from_numpy(matrix).to(dtype), wanted(nonzero(matrix), k, which), tol=TOLERANCE[dtype])
