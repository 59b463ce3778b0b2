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


def inner_products(blocks: Sequence[Block], rows: Sequence[Tensor], weights: Tensor, *, whole: bool) -> Tensor:
    """Inner products of the vectors and rows of all blocks, (k + n, k + n), where and as precise as the weights.

    Where not the whole is wanted, the vectors are taken to be orthonormal: half of the price.
    """
    k, n = len(weights), len(rows[0])
    parts = []
    for block, new in zip(blocks, rows, strict=True):
        part = torch.zeros(k + n, k + n, dtype=block.dtype, device=block.device)
        for _, vectors, chunk in chunks(block, new):
            part[k:, :k].addmm_(chunk, vectors.T)
            part[k:, k:].addmm_(chunk, chunk.T)
            if whole:
                part[:k, :k].addmm_(vectors, vectors.T)
        parts.append(part.to(weights))
    (total,) = totals([block.params[0] for block in blocks], parts)
    total[:k, k:] = total[k:, :k].T
    if not whole:
        total.diagonal()[:k] = 1
    return total


def mix(block: Block, rows: Tensor, mixing: Tensor, good: Tensor) -> None:
    """Replace the basis by a mixture (k, k + n) of its vectors and the rows, where that is good."""
    k = len(mixing)
    factors = mixing.to(device=block.device, dtype=block.dtype)
    old, new = factors[:, :k].contiguous(), factors[:, k:].contiguous()
    good = good if good.device == block.device else good.to(block.device)
    for columns, vectors, chunk in chunks(block, rows):
        # Zero times an entry that is not finite is none either.
        block.basis[:, columns] = torch.where(good, (old @ vectors).addmm_(new, chunk), vectors).to(block.basis.dtype)


def chunks(block: Block, rows: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some columns at a time: of the vectors (k, c), and of the rows (n, c)."""
    width = _CHUNK if block.device.type == "cpu" else _LARGE_CHUNK
    for start in range(0, block.size, width):
        columns = slice(start, min(start + width, block.size))
        yield columns, block.basis[:, columns].to(block.dtype), rows[:, columns].to(block.dtype)
