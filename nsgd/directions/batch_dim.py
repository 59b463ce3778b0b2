"""Where the samples of a batch lie: the dimension of each of its tensors that counts them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsgd.curvature.checks import plain, shown

BatchDim = int | Sequence[int]


def check_loss(loss: object) -> None:
    """Raise a ValueError unless this may be a function of a batch."""
    if not callable(loss):
        raise ValueError(
            f"expected the loss to be a function of the batch, got a {type(loss).__name__}; write lambda x, y: "
            "loss_fn(model(x), y)"
        )


def samples_first(tensors: Sequence[object], batch_dim: BatchDim = 0) -> tuple[list[Tensor], tuple[int, ...]]:
    """Views of the tensors of a batch with its samples along the first dimension, and where they were in each.

    Args:
        tensors: The batch.
        batch_dim: The dimension that counts samples: one for all tensors, or one for each.

    Raises:
        ValueError: If there are no tensors or no samples, a tensor lacks the dimension, or lengths differ.
    """
    others = [type(tensor).__name__ for tensor in tensors if not isinstance(tensor, Tensor)]
    if others:
        raise ValueError(f"expected tensors, a row for each sample, got a {others[0]}; make it one by torch.as_tensor")
    known = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    dims = _checked_dims(batch_dim, len(known))
    for number, (tensor, dim) in enumerate(zip(known, dims, strict=True)):
        if dim and not -tensor.ndim <= dim < tensor.ndim:  # without any dimension it has length 0, below
            raise ValueError(
                f"expected tensors with a dimension {dim} that counts samples, got number {number} of shape "
                f"{tuple(tensor.shape)}; pass batch_dim with one dimension for each tensor, such as (1, 0)"
            )
    lengths = {tensor.shape[dim] if tensor.ndim else 0 for tensor, dim in zip(known, dims, strict=True)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"expected tensors of one length, a row for each sample, got lengths {sorted(lengths)}; batch_dim says "
            "which dimension counts samples, where it is not the first"
        )
    return [tensor.movedim(dim, 0) for tensor, dim in zip(known, dims, strict=True)], dims


def check_batch_dim(batch_dim: object) -> None:
    """Raise a ValueError unless this is a dimension, or one for each of some tensors."""
    _checked_dims(batch_dim, len(batch_dim) if isinstance(batch_dim, Sequence) else 1)


def _checked_dims(batch_dim: object, count: int) -> tuple[int, ...]:
    """A dimension for each of so many tensors."""
    several = isinstance(batch_dim, Sequence) and not isinstance(batch_dim, str)
    dims = [plain(dim) for dim in batch_dim] if isinstance(batch_dim, Sequence) and several else [plain(batch_dim)]
    if not dims or any(isinstance(dim, bool) or not isinstance(dim, int) for dim in dims):
        raise ValueError(
            "expected batch_dim to be the dimension that counts samples, or one for each tensor, got "
            f"{shown(batch_dim)}; batch-first is 0, time-major 1"
        )
    if several and len(dims) != count:
        raise ValueError(f"expected a batch_dim for each of {count} tensors, got {len(dims)}; pass one number for all")
    return tuple(dims) if several else tuple(dims) * count


def as_given(part: Tensor, dim: int) -> Tensor:
    """A copy of some samples, which lie along the first dimension, with them along the one where they were."""
    return part.clone() if dim == 0 else part.movedim(0, dim).clone(memory_format=torch.contiguous_format)
