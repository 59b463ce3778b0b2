"""The running average of the covariance of samples' gradients, kept at rank k, without waiting for the device.

Of the covariance, and not of the second moment: that counts the mean gradient as well, which need not be sharp, and
training whose step is damped along it was slower than SGD (``nsgd/README.md``, "Limits").

One estimate from a few samples is mostly noise, and one from many is dear and soon stale. The exponential average of
many small ones overlaps the exact directions better at a fraction of the price (benchmarks/results/tracking.csv).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsgd.curvature.guard import full_precision
from nsgd.curvature.low_rank import NEGLIGIBLE, top_of_sum
from nsgd.curvature.small import inverse_root
from nsgd.directions.flat import Block, like
from nsgd.directions.mixing import inner_products, mix
from nsgd.directions.processes import settled
from nsgd.directions.running_average import MOST

# Powers of two by which gradients are scaled, so that float32 holds the sums of their squares.
_LARGEST_POWER = 100


@dataclass(frozen=True)
class Past:
    """Contents of a running average, where the directions are."""

    count: Tensor  # (), estimates in it
    usual: Tensor  # (), their trace of late


@dataclass(frozen=True)
class Cleaned:
    """Gradients of groups that can be averaged."""

    shares: Tensor  # (m,), of the groups, 1 together; 0 of those without a gradient, or of all
    scale: Tensor  # (), what the gradients are multiplied by, a power of two
    good: Tensor  # (), whether all of the rest are finite


@torch.no_grad()
@full_precision
def centred(rows: Sequence[Tensor], new: Cleaned) -> Cleaned:
    """Take the mean gradient out of the gradients of groups, in place, so that their covariance is left; no host sync.

    With weights a_i the covariance's are a_i / (1 - sum a_j^2), for n equal ones 1 / (n - 1). Where the gradients agree
    but for rounding none is left. Costs three passes over the rows.

    Args:
        rows: As :func:`cleaned` leaves them, (m, P) for each block.
        new: What it says of them.
    """
    kept = (new.shares > 0).to(new.shares)
    spread, rounding = torch.zeros_like(new.scale), torch.zeros_like(new.scale)
    for row in rows:
        if row.numel():
            mean = like(new.shares, row) @ row  # (P,)
            row.addr_(like(kept, row), mean, alpha=-1.0)
            spread = torch.maximum(spread, like(torch.maximum(row.amax(), -row.amin()), spread))
            bound = len(row) * torch.finfo(row.dtype).eps * torch.maximum(mean.amax(), -mean.amin())
            rounding = torch.maximum(rounding, like(bound, rounding))
    shares = torch.where(spread > rounding, new.shares / (1 - new.shares.square().sum()), 0.0)
    return replace(new, shares=shares)


@dataclass(frozen=True)
class Folded:
    """A running average with one estimate more; its vectors are the blocks' bases."""

    weights: Tensor  # (k,), descending, 0 where there is no direction
    overlap: Tensor  # (), mean squared cosine between the vectors before and after
    past: Past


def cleaned(rows: Sequence[Tensor], values: Tensor, counts: Tensor) -> Cleaned:
    """Leave groups without a label out, and bring the others into range, in place; no host sync.

    Costs four passes over the rows.

    Args:
        rows: Gradients of the groups, (m, P) for each block. Those of groups that are left out become zero; all of
            them, where a loss or a gradient of the others is not finite, or fewer than two groups are left.
        values: Losses (m,); NaN where a group has no label.
        counts: Samples (m,), or what each group counts for, where the result is wanted.
    """
    values = like(values, counts)
    known = ~values.isnan()
    largest = torch.zeros_like(counts)  # entry of each group
    for row in rows:
        if row.numel():
            # Not by aminmax, which takes twenty times as long along a dimension on the CPU.
            bound = torch.maximum(row.amax(dim=1), -row.amin(dim=1))
            largest = torch.maximum(largest, like(bound, counts))
    finite = values.isfinite() & largest.isfinite()
    good = (finite | ~known).all() & (known.sum() > 1)
    kept = known & good
    most = torch.where(kept, largest, 0.0).max()
    power = torch.frexp(most).exponent.clamp(-_LARGEST_POWER, _LARGEST_POWER)
    scale = torch.ldexp(torch.ones_like(most), -power)
    factors = torch.where(kept, scale, 0.0)
    for row in rows:
        row.mul_(like(factors, row)[:, None]).nan_to_num_(0.0, 0.0, 0.0)  # zero times infinity is NaN
    shares = torch.where(kept, counts, 0.0)
    return Cleaned(shares / shares.sum().clamp(min=torch.finfo(shares.dtype).tiny), scale, good)


@torch.no_grad()
@full_precision
def fold(
    blocks: Sequence[Block],
    rows: Sequence[Tensor],
    new: Cleaned,
    weights: Tensor,
    past: Past,
    *,
    decay: float,
    k: int,
) -> Folded:
    """The running average with one estimate more: a plain mean until so many are in that the decay sets in.

    No host sync; where the estimate is not good, all stays as it is. With m groups it costs two Gram matrices, of
    r + m vectors and of k, two products with them, and, but for the rows, no memory of their size. Off the CPU pairs of
    nearly one weight may stand for each other (:func:`nsgd.curvature.small.orthogonal_iteration`).

    Args:
        blocks: The parameters, with r vectors each; they are replaced by k, or by r + m where that is less.
        rows: Gradients of the groups, (m, P) for each block.
        new: What :func:`cleaned`, and :func:`centred`, say of them. They count for at most twice the usual trace.
        weights: Of the vectors so far, (r,); only those above zero count.
        past: Of the average; a count of zero begins anew.
        decay: Share of the last average, in [0, 1); 0 begins anew.
        k: Rank to keep.
    """
    k = min(k, len(weights) + len(new.shares))
    weights = torch.cat([weights, weights.new_zeros(k - len(weights))])
    for block in blocks:
        if len(block.basis) < k:
            grown = block.rows(k)
            grown[: len(block.basis)] = block.basis
            block.basis = grown
    gram = inner_products(blocks, rows, weights, whole=True)  # (k + m, k + m)
    gram[k:] /= new.scale
    gram[:, k:] /= new.scale
    # Vectors of a checkpoint may hold anything.
    valid = gram[:k, :k].isfinite().all()
    gram[:k].masked_fill_(~valid, 0.0)
    gram[:, :k].masked_fill_(~valid, 0.0)
    for block in blocks:
        block.basis.masked_fill_(~valid.to(block.device), 0.0)

    count = torch.where(valid, past.count, 0.0) if decay > 0 else torch.zeros_like(past.count)
    share = (1 - 1 / (count + 1)).clamp(max=decay)
    size = (new.shares * gram.diagonal()[k:]).sum()
    clipped = torch.where((share > 0) & (past.usual > 0), torch.minimum(size, MOST * past.usual), size)
    usual = torch.where(share > 0, (past.usual + clipped) / 2, clipped)
    clip = torch.where(size > 0, clipped / size, 1.0)
    inputs = torch.cat([weights.clamp(min=0.0) * share, new.shares * clip * (1 - share)])
    owners = [block.params[0] for block in blocks]
    values, mixing = top_of_sum(gram, inputs, k, negligible=NEGLIGIBLE[blocks[0].dtype])
    values, mixing = settled(gram, owners, values, mixing)

    there = gram.diagonal()[:k] > 0.5  # unit vectors, or zero
    factors = torch.cat([mixing[:, :k], mixing[:, k:] / new.scale], dim=1)
    for block, row in zip(blocks, rows, strict=True):
        mix(block, row, factors, new.good)
    none = [row[:0] for row in rows]
    gram_after = inner_products(blocks, none, weights, whole=True)
    # Of a mixture in float32, the vectors of small weights are a little off; the orthonormal ones that are closest.
    (whitening,) = settled(gram_after, owners, inverse_root(gram_after))
    for block, row in zip(blocks, none, strict=True):
        mix(block, row, whitening, new.good)
    shared = (whitening @ mixing @ gram[:, :k]).square().sum()
    both = torch.minimum(there.sum(), (gram_after.diagonal() > 0.5).sum()).clamp(min=1)
    return Folded(
        torch.where(new.good, values, weights),
        shared / both,
        Past(torch.where(new.good, count + 1, past.count), torch.where(new.good, usual, past.usual)),
    )
