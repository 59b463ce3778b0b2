"""A basis and rows of new vectors: their inner products, and their mixture in place of the basis; no host sync.

Some columns at a time, so that neither takes a copy of the vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nsgd.directions.flat import Block
from nsgd.directions.shards import totals

# Entries of each vector that are mixed at once: what a cache holds on a CPU; elsewhere few launches, and little memory.
_CHUNK, _LARGE_CHUNK = 1 << 14, 1 << 21

# Columns whose inner products are one of a batch, off the CPU: a single product of so long rows would keep few of the
# device's processors at work.
_PART = 1 << 12


def inner_products(blocks: Sequence[Block], rows: Sequence[Tensor], weights: Tensor, *, whole: bool) -> Tensor:
    """Inner products of the vectors and rows of all blocks, (k + n, k + n), where and as precise as the weights.

    Where not the whole is wanted, the vectors are taken to be orthonormal: half of the price.
    """
    k, n = len(weights), len(rows[0])
    parts = []
    for block, new in zip(blocks, rows, strict=True):
        part = torch.zeros(k + n, k + n, dtype=block.dtype, device=block.device)
        for _, vectors, chunk in chunks(block, new):
            _add_products(part[k:, :k], chunk, vectors)
            _add_products(part[k:, k:], chunk, chunk)
            if whole:
                _add_products(part[:k, :k], vectors, vectors)
        parts.append(part.to(weights))
    (total,) = totals([block.params[0] for block in blocks], parts)
    total[:k, k:] = total[k:, :k].T
    if not whole:
        total.diagonal()[:k] = 1
    return total


def _add_products(total: Tensor, one: Tensor, other: Tensor) -> None:
    """Add the inner products (a, b) of rows (a, c) with others (b, c)."""
    batches = 0 if one.device.type == "cpu" else one.shape[1] // _PART
    if batches > 1:
        many = slice(0, batches * _PART)
        left = one[:, many].view(len(one), batches, _PART).transpose(0, 1)
        right = other[:, many].view(len(other), batches, _PART).permute(1, 2, 0)
        total.add_(torch.bmm(left, right).sum(0))
        one, other = one[:, many.stop :], other[:, many.stop :]
    total.addmm_(one, other.T)


def mix(block: Block, rows: Tensor, mixing: Tensor, good: Tensor | None = None) -> None:
    """Replace the basis by a mixture (k, k + n) of its vectors and the rows; where that may not be good, if it is."""
    k = len(mixing)
    factors = mixing.to(device=block.device, dtype=block.dtype)
    old, new = factors[:, :k].contiguous(), factors[:, k:].contiguous()
    good = None if good is None else good.to(block.device)
    for columns, vectors, chunk in chunks(block, rows):
        mixture = (old @ vectors).addmm_(new, chunk)
        # Zero times an entry that is not finite is none either.
        block.basis[:, columns] = mixture if good is None else torch.where(good, mixture, vectors)


def chunks(block: Block, rows: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some columns at a time: of the vectors (k, c), and of the rows (n, c)."""
    width = _CHUNK if block.device.type == "cpu" else _LARGE_CHUNK
    for start in range(0, block.size, width):
        columns = slice(start, min(start + width, block.size))
        yield columns, block.basis[:, columns].to(block.dtype), rows[:, columns].to(block.dtype)
