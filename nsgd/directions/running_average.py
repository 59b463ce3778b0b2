"""Following the sharpest directions through training: a running average of low-rank estimates, kept at rank k.

One estimate from a few samples is mostly noise, and one from many is dear and soon stale. The exponential average of
many small ones overlaps the exact directions better at a fraction of the price (benchmarks/results/tracking.csv).
An estimate is a sum of weighted outer products: eigenvalues and eigenvectors of a sample's Hessian, or gradients of
small groups of samples, whose average the optimizer takes without a wait (:mod:`nsgd.directions.sample_average`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsgd.curvature.low_rank import Which, low_rank, squared_lengths

Estimate = tuple[Tensor, Tensor]  # weights (m,), vectors (m, P): a sum of weighted outer products

MOST = 2.0  # times the usual trace that one estimate may have


@dataclass(frozen=True)
class Average:
    """A running average of estimates, at rank k."""

    weights: Tensor  # (r,), descending
    vectors: Tensor  # (r, P), orthonormal rows
    count: int  # estimates in it
    usual: float  # their trace of late


def follow(last: Average | None, new: Estimate, *, decay: float, k: int, which: Which = "LA") -> Average:
    """The running average with one estimate more: a plain mean until so many are in that the decay sets in.

    Args:
        last: The average so far, its vectors as ``new``'s in dtype and device; None to begin.
        new: Weights (m,) and vectors (m, P); counts for at most twice the usual trace.
        decay: Share of the last average, in [0, 1); 0 begins anew.
        k: Rank to keep.
        which: The largest, or the largest in size.
    """
    if last is None or decay == 0:
        return Average(*low_rank(*new, k=k, which=which), 1, trace(new))
    new, usual = clipped(new, last.usual)
    count = last.count + 1
    old = last.weights, last.vectors
    return Average(*average(old, new, decay=min(decay, 1 - 1 / count), k=k, which=which), count, usual)


def average(old: Estimate, new: Estimate, *, decay: float, k: int, which: Which = "LA") -> Estimate:
    """Rank-k part of ``decay * old + (1 - decay) * new``, each given as weights (m,) and vectors (m, P)."""
    (old_weights, old_vectors), (new_weights, new_vectors) = old, new
    weights = torch.cat([decay * old_weights.cpu().double(), (1 - decay) * new_weights.cpu().double()])
    return low_rank(weights, [old_vectors, new_vectors], k=k, which=which)


def clipped(new: Estimate, usual: float) -> tuple[Estimate, float]:
    """An estimate whose trace is at most twice the usual, and what is usual after it: the mean of its trace and that.

    One spike of the loss, a hundred times the usual gradients, would otherwise own the average until it has decayed.
    What lasts is followed: the bound grows by half a refresh.

    Args:
        new: Weights (m,) and vectors (m, P).
        usual: Trace of late; not positive where there is none to go by.
    """
    weights, vectors = new
    size = trace(new)
    most = MOST * usual
    if 0 < most < size:
        weights, size = weights * (most / size), most
    return (weights, vectors), (usual + size) / 2


def trace(estimate: Estimate) -> float:
    """Sum of the sizes of its outer products, weight times squared length."""
    weights, vectors = estimate
    return float((weights.cpu().double().abs() * squared_lengths(vectors)).sum())
