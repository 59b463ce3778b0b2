"""A batch taken in parts: the same gradient, and better directions from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsgd.curvature.checks import shown, whole_number
from nsgd.directions.batch_dim import BatchDim, as_given, check_loss, samples_first


def backward_in_chunks(
    loss: Callable[..., Tensor],
    *tensors: Tensor,
    chunks: int = 8,
    backward: Callable[[Tensor], Any] = torch.Tensor.backward,
    batch_dim: BatchDim = 0,
) -> Tensor:
    """Add up the gradient of a batch from parts of it, one backward pass each; in place of ``loss.backward()``.

    ``backward_in_chunks(lambda x, y: loss_fn(model(x), y), x, y)``. The gradient is that of the mean loss of the whole
    batch, but for what looks across samples: BatchNorm in training mode takes its statistics from a part, a contrastive
    loss its negatives. An optimizer that follows training gradients takes the parts' deviations from their mean for its
    directions: better ones than differences of steps, at no gradient (benchmarks/results/tracking.csv).

    Cost: a gradient of the batch, in launches a chunk, with the activations of one part at a time in memory.

    Args:
        loss: Mean loss of the samples that it is given.
        tensors: The batch, cut along the first dimension, or ``batch_dim``; one row a sample.
        chunks: Number of parts, at most; fewer where only those are of one size, so that none weighs more than another.
        backward: What is called with each part's share of the loss, such as
            ``lambda part: scaler.scale(part).backward()`` or ``accelerator.backward``.
        batch_dim: The dimension that counts samples: one for all tensors, or one for each. A time-major sequence has 1.

    Returns:
        Mean loss of the batch, detached.

    Raises:
        ValueError: If there are no tensors or no samples, a tensor has no such dimension, lengths differ, ``chunks`` is
            no count of at least 1, ``backward`` no function, or a loss is no scalar, which is seen before the first
            backward pass.
    """
    check_loss(loss)
    rows, dims = samples_first(tensors, batch_dim)
    samples = len(rows[0])
    chunks = whole_number("chunks", chunks, least=1)
    if not callable(backward):
        raise ValueError(f"expected backward to be a function of a loss, got {shown(backward)}; leave it out")
    most = min(chunks, samples)
    equal = [count for count in range(2, most + 1) if samples % count == 0]
    parts = [tensor.tensor_split(equal[-1] if equal else most) for tensor in rows]
    total: Tensor | None = None
    for part in zip(*parts, strict=True):
        value = loss(*(as_given(own, dim) if dim else own for own, dim in zip(part, dims, strict=True)))
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(f"expected the loss to return a scalar tensor, the samples' mean, got {got}")
        share = value.reshape(()) * (len(part[0]) / samples)
        backward(share)
        total = share.detach() if total is None else total + share.detach()
    assert total is not None
    return total
