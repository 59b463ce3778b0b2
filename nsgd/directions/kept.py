"""Tensors of a checkpoint: at every step the same, of the same shapes.

``torch.distributed.checkpoint`` loads what the optimizer that it loads into would save, key by key and shape by shape.
So what is not there yet, or not any more, is saved as zeros, which take no memory and no place in a file of torch.save.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsgd.directions.differences import ROWS
from nsgd.directions.flat import Block
from nsgd.options import FROM_TRAINING, DampingOptions

DIRECTIONS, ROWS_OF, LAST, FIRST_PASS = "directions", "nsgd_rows", "nsgd_last_gradient", "nsgd_first_pass"


def blank(options: DampingOptions, blocks: Sequence[Block], *, whole: bool) -> dict[int, dict[str, Tensor]]:
    """Zeros in the place of everything, for each parameter by its identity.

    Args:
        options: Of the optimizer; none where directions are not saved.
        blocks: The parameters.
        whole: Whether they have memory of their own, to be written to.
    """
    if not options.save_basis:
        return {}
    shapes: dict[str, tuple[int, ...]] = {DIRECTIONS: (options.k,)}
    if options.solver in FROM_TRAINING:
        shapes |= {ROWS_OF: (ROWS,), LAST: (), FIRST_PASS: ()}
    found = {}
    for block in blocks:
        for p, shape in zip(block.params, block.shapes, strict=True):
            entry = {}
            for name, lead in shapes.items():
                dtype = block.dtype if name in (LAST, FIRST_PASS) else block.basis_dtype
                size = (*lead, *shape)
                zero = torch.zeros(size if whole else (), dtype=dtype, device=block.device)
                entry[name] = zero if whole else zero.expand(size)
            found[id(p)] = entry
    return found


def filled(rows: Tensor, count: int) -> Tensor:
    """Rows (r, ...) followed by zeros, ``count`` of them in all, or themselves where they are as many or more."""
    return rows if len(rows) >= count else torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])
