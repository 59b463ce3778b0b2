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

from nsgd.hessian import Losses, group_gradients
from nsgd.low_rank import Which, low_rank


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
